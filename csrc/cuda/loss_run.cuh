// SPDX-License-Identifier: Apache-2.0
// One dtype's loss: which rung serves a call, how shared memory is laid out, and the launch.
// loss_<dtype>.cu compile it, so that they can be compiled side by side.
#pragma once

#include "launch.h"
#include "loss.cuh"

namespace msdkern {

// Rows whose labels every block counts for itself; more are counted by a launch before.
constexpr int64_t kCounted = 4096;

struct Choice {
    const Rung *rung;
    Plan plan;
    int threads;
    int64_t grid, shared;
};

template <class S>
class Chooser {
 public:
    typedef RealOf<S> Real;
    Chooser(const msdkern_loss &call, Form form, bool general)
        : call_(call),
          machine_(machine(call.place.device)),
          rows_(call.exits + call.teachers),
          registers_(!general && sizeof(S) <= 4 && call.pairs != MSDKERN_PAIRS_DENSE &&
                     call.divergence == MSDKERN_FORWARD_KL && !call.target &&
                     call.label_smoothing == 0 && call.classes % kVector<S> == 0) {
        plan_.vector = true;
        for (int r = 0; r < rows_; ++r)
            plan_.vector &= on_vectors<S>(call.logits[r], call.stride[r]);
        for (int k = 0; k < call.exits; ++k)
            if (call.gradient[k]) plan_.vector &= on_vectors<S>(call.gradient[k], call.classes);
        plan_.fields =
            form != Form::kScalar ? 0 : call.exits * (3 + (call.pair_divergence ? rows_ : 0));
        plan_.slots = 3 * rows_ + 1;
        plan_.counted = kCounted;
    }
    // The first rung whose layout fits; the last one when none does.
    Choice choose() {
        Choice choice = {};
        for (int i = 0; i < kRungs; ++i) {
            choice.rung = &kLadder[i];
            if (serves(*choice.rung) && lay_out(choice)) break;
        }
        return choice;
    }

 private:
    int64_t chunks(const Rung &rung) const {
        const int64_t step = int64_t(kVector<S>) * rung.lanes * rung.blocks;
        return (call_.classes + step - 1) / step;
    }
    bool serves(const Rung &rung) const {
        if (rung.home == Home::kRegisters && !(registers_ && plan_.vector)) return false;
        if (rung.rows && rows_ > rung.rows) return false;
        if (rung.blocks > 1 && !machine_.clusters) return false;
        return !rung.chunks || chunks(rung) <= rung.chunks;
    }
    bool lay_out(Choice &choice) {
        const Rung &rung = *choice.rung;
        int threads = rung.threads;
        // Few rows: rather more blocks than more teams per block.
        while (threads > 32 && threads > rung.lanes &&
               call_.rows * rung.lanes < int64_t(threads) * machine_.processors)
            threads /= 2;
        Plan &p = plan_;
        p.lanes = rung.lanes;
        p.teams = threads / rung.lanes;
        p.blocks = rung.blocks;
        const int warps = rung.lanes < 32 ? 1 : rung.lanes / 32;
        const int64_t reals = int64_t(call_.exits) * rows_ +
                              int64_t(Exchange<Real>::size(p.slots, warps, rung.blocks));
        const int64_t team =
            aligned(int64_t(sizeof(RowState<Real>)) * rows_ + reals * int64_t(sizeof(Real))) +
            aligned(p.fields * 8);
        const int64_t values = rung.home == Home::kRegisters
                                   ? 0
                                   : int64_t(call_.exits) * threads * int64_t(sizeof(Real));
        const int64_t held = rung.home == Home::kShared ? rows_ * chunks(rung) * threads * 16 : 0;
        const int64_t kept = held / int64_t(sizeof(S)) * int64_t(sizeof(Real));
        p.team_at = kBlockBytes;
        p.team_bytes = int(team);
        p.values_at = int(p.team_at + team * p.teams);
        p.rows_at = int(p.values_at + aligned(values));
        p.keeps = held + kept <= rung.kilobytes * 1024 / 2;
        choice.shared = p.rows_at + held;
        const int64_t most = machine_.shared / rung.resident;
        if (p.keeps && choice.shared + kept <= most)
            choice.shared += kept;
        else
            p.keeps = false;
        choice.plan = p;
        choice.threads = threads;
        const int64_t wanted = (call_.rows + p.teams - 1) / p.teams;
        const int64_t room = int64_t(machine_.processors) * rung.resident / rung.blocks;
        choice.grid = (wanted < 1 ? 1 : wanted < room ? wanted : room < 1 ? 1 : room) * rung.blocks;
        return held <= rung.kilobytes * int64_t(1024) && choice.shared <= most;
    }
    const msdkern_loss &call_;
    const Machine machine_;
    const int rows_;
    const bool registers_;
    Plan plan_ = {};
};

template <class S, class At, bool kGeneral, int kThreads, int kResident>
cudaError_t launch_loss(const msdkern_loss &call, const Choice &choice, Form form) {
    return launch(call.place.stream, choice.grid, choice.threads, choice.plan.blocks, choice.shared,
                  loss_kernel<S, At, kGeneral, kThreads, kResident>, call, choice.plan, form);
}
template <class S, class At>
cudaError_t launch_roomy(const msdkern_loss &call, const Choice &choice, Form form, bool general) {
    return general ? launch_loss<S, At, true, 256, roomy(true, sizeof(S))>(call, choice, form)
                   : launch_loss<S, At, false, 256, roomy(false, sizeof(S))>(call, choice, form);
}

template <class S>
cudaError_t launch_choice(const msdkern_loss &call, const Choice &choice, Form form, bool general) {
    const Home home = choice.rung->home;
    if constexpr (sizeof(S) <= 4) {
        if (home == Home::kRegisters && choice.rung->chunks == 1)
            return launch_loss<S, Registers<S, 8, 1>, false, 128, 3>(call, choice, form);
        if (home == Home::kRegisters)
            return launch_loss<S, Registers<S, 8, 2>, false, 128, 2>(call, choice, form);
    }
    return home == Home::kShared ? launch_roomy<S, Shared<S>>(call, choice, form, general)
                                 : launch_roomy<S, Global<S>>(call, choice, form, general);
}

template <class S>
cudaError_t run_loss(const msdkern_loss &call, Form form) {
    const bool direct = call.divergence == MSDKERN_FORWARD_KL || call.divergence == MSDKERN_SOFT_CE;
    const bool divergent = call.pairs != MSDKERN_PAIRS_NONE || call.pair_divergence;
    const bool general = divergent && (!direct || !call.detach_teacher || call.pair_divergence);
    const Choice choice = Chooser<S>(call, form, general).choose();
    if (form == Form::kScalar && call.label && call.rows > kCounted) {
        Tally *tally = static_cast<Tally *>(call.place.workspace);
        const cudaError_t error = launch(call.place.stream, 1, 1024, 1, 32 * sizeof(double),
                                         count_kernel<RealOf<S>>, call, tally);
        if (error != cudaSuccess) return error;
    }
    return launch_choice<S>(call, choice, form, general);
}

}  // namespace msdkern

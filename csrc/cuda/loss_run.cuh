// SPDX-License-Identifier: Apache-2.0
// One dtype's loss: which rung serves a call, how shared memory is laid out, and the launch.
// loss_<dtype>.cu compile it, so that they can be compiled side by side.
#pragma once

#include "launch.h"
#include "loss.cuh"

namespace msdkern {

// Rows whose labels every block counts for itself; more are counted by a launch before.
constexpr int64_t kCounted = 4096;

// Rows that the sweeps of tile.cuh hold at most.
constexpr int kMostTiled = 8;

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
          labels_(!call.target && call.label_smoothing == 0),
          tile_(!general && sizeof(S) <= 4 && call.divergence == MSDKERN_FORWARD_KL &&
                rows_ <= kMostTiled && (rows_ <= 4 || call.exits > 4) && shallow_learn()) {
        align_rows();
        plan_.fields =
            form != Form::kScalar ? 0 : call.exits * (3 + (call.pair_divergence ? rows_ : 0));
        plan_.slots = 3 * rows_ + 1;
        plan_.counted = kCounted;
        plan_.general = general;
    }
    // The first rung whose layout fits; the last one when none does.
    Choice choose() {
        Choice choice = {};
        if (tile_ && climb(kTileLadder, choice)) return choice;
        tile_ = false;
        climb(kLadder, choice);
        return choice;
    }

 private:
    int64_t chunks(const Rung &rung) const {
        const int64_t step = int64_t(kVector<S>) * rung.lanes * rung.blocks;
        return (call_.classes + plan_.spare + step - 1) / step;
    }
    // Whether the rows of any sample lie alike, and how.
    void align_rows() {
        const auto bytes = [&](int64_t stride) {
            return call_.rows > 1 ? uint64_t(stride) * sizeof(S) : 0;
        };
        const uint64_t at = uint64_t(call_.logits[0]), step = bytes(call_.stride[0]);
        uint64_t apart = at % sizeof(S);
        const auto compare = [&](const void *p, int64_t stride) {
            apart |= (uint64_t(p) ^ at) | (bytes(stride) ^ step);
        };
        for (int r = 0; r < rows_; ++r) compare(call_.logits[r], call_.stride[r]);
        for (int k = 0; k < call_.exits; ++k)
            if (call_.gradient[k]) compare(call_.gradient[k], call_.classes);
        plan_.vector = apart % 16 == 0;
        if (!plan_.vector) return;
        plan_.lead = int(at % 16 / sizeof(S));
        plan_.turn = int(step % 16 / sizeof(S));
        plan_.spare = plan_.lead || plan_.turn ? kVector<S> - 1 : 0;
    }
    // Gradients of no exit, of every one, or of the shallowest ones: as many as the sweeps store at
    // least (homes.cuh).
    bool shallow_learn() const {
        int first = 0, all = 0;
        while (first < call_.exits && call_.gradient[first]) ++first;
        for (int k = 0; k < call_.exits; ++k) all += call_.gradient[k] != nullptr;
        return all == 0 || (first == all && (rows_ <= 4 || first >= 4));
    }
    template <size_t kCount>
    bool climb(const Rung (&ladder)[kCount], Choice &choice) {
        for (const Rung &rung : ladder) {
            choice.rung = &rung;
            if (serves(rung) && lay_out(choice)) return true;
        }
        return false;
    }
    bool short_for(const Rung &rung) const {
        return call_.classes * 2 <= int64_t(kVector<S>) * rung.lanes * rung.blocks;
    }
    bool serves(const Rung &rung) const {
        const bool lean = labels_ && call_.pairs != MSDKERN_PAIRS_DENSE;
        if (tile_ && rung.home != Home::kShared && !lean) return false;
        if (rung.home == Home::kRegisters &&
            !(plan_.vector && !plan_.spare && call_.classes % kVector<S> == 0))
            return false;
        if (rung.rows && rows_ > rung.rows) return false;
        if (rung.blocks > 1 && (!machine_.clusters || short_for(rung))) return false;
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
        p.tile = tile_;
        // A thread's numbers per row: TileSums::softmaxes() has the most.
        const int per_thread = rung.home == Home::kRegisters ? 0
                               : !p.tile                     ? 2 * call_.exits
                               : rung.home == Home::kShared  ? rows_
                                                             : 3 * rows_;
        const int64_t values = int64_t(per_thread) * threads * int64_t(sizeof(Real));
        const int64_t places = rung.home == Home::kShared             ? chunks(rung)
                               : rung.home == Home::kGlobal && p.tile ? 1
                                                                      : 0;
        const int64_t held = rows_ * places * threads * 16;
        const int64_t kept = held / int64_t(sizeof(S)) * int64_t(sizeof(Real));
        p.team_at = kBlockBytes;
        p.team_bytes = int(team);
        p.values_at = int(p.team_at + team * p.teams);
        p.rows_at = int(p.values_at + aligned(values));
        p.keeps = !p.tile && held + kept <= rung.kilobytes * 1024 / 2;
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
        return (rung.home != Home::kShared || held <= rung.kilobytes * int64_t(1024)) &&
               choice.shared <= most;
    }
    const msdkern_loss &call_;
    const Machine machine_;
    const int rows_;
    const bool labels_;
    bool tile_;
    Plan plan_ = {};
};

template <class S, class At, int kThreads, int kResident>
cudaError_t launch_loss(const msdkern_loss &call, const Choice &choice, Form form) {
    return launch(call.place.stream, choice.grid, choice.threads, choice.plan.blocks, choice.shared,
                  loss_kernel<S, At, kThreads, kResident>, call, choice.plan, form);
}

template <class S>
cudaError_t launch_choice(const msdkern_loss &call, const Choice &choice, Form form) {
    const Home home = choice.rung->home;
    if constexpr (sizeof(S) <= 4) {
        if (home == Home::kRegisters)
            return launch_loss<S, Registers<S, 8, 1>, 128, 3>(call, choice, form);
        if (choice.plan.tile && home == Home::kGlobal)
            return launch_loss<S, Streamed<S, kMostTiled>, kTileThreads, 1>(call, choice, form);
        if (choice.plan.tile && call.exits + call.teachers <= 4)
            return launch_loss<S, Tiled<S, 4>, kTileThreads, 1>(call, choice, form);
        if (choice.plan.tile)
            return launch_loss<S, Tiled<S, kMostTiled>, kTileThreads, 1>(call, choice, form);
    }
    return home == Home::kShared ? launch_loss<S, Shared<S>, 256, 1>(call, choice, form)
                                 : launch_loss<S, Global<S>, 256, 1>(call, choice, form);
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
    return launch_choice<S>(call, choice, form);
}

}  // namespace msdkern

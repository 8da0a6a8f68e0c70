// SPDX-License-Identifier: Apache-2.0
// (7) What gates and calibration read of the logits, in one read of them.
#include "loss_run.cuh"

namespace msdkern {
namespace {

template <class S, class At>
struct Statistics {
    typedef RealOf<S> Real;
    static constexpr int V = kVector<S>;
    const msdkern_statistics &call;
    Sample<S> &s;
    const At &home;

    // sum e^2 in slot 2 k, sum e (z - m) in slot 2 k + 1.
    MSDKERN_DEVICE void sums() const {
        for (int k = 0; k < s.exits; ++k) {
            Real squares = 0, weighted = 0;
            for (int i = 0; i < s.cut.chunks; ++i) {
                Real x[V], e[V];
                s.terms(home, k, i, x, e);
#pragma unroll
                for (int v = 0; v < V; ++v) {
                    squares += e[v] * e[v];
                    weighted += weigh(e[v], x[v]);
                }
            }
            s.exchange.template put<Sum>(s.team, 2 * k, squares);
            s.exchange.template put<Sum>(s.team, 2 * k + 1, weighted);
        }
        s.exchange.template finish<Sum>(s.team, 2 * s.exits);
    }
    // The largest logit but one, in slot k: equal to the largest where that occurs twice.
    MSDKERN_DEVICE void runners_up() const {
        for (int k = 0; k < s.exits; ++k) {
            const int top = s.state[k].prediction;
            Real best = lowest<Real>();
            for (int i = 0; i < s.cut.chunks; ++i) {
                Real z[V];
                unpack<S>(home.raw(k, i), z);
#pragma unroll
                for (int v = 0; v < V; ++v)
                    if (s.cut.first(i) + v * s.cut.step() != top) best = larger(best, z[v]);
            }
            s.exchange.template put<Maximum>(s.team, k, best);
        }
        s.exchange.template finish<Maximum>(s.team, s.exits);
    }
    MSDKERN_DEVICE static Real *real(void *p) { return static_cast<Real *>(p); }
    // Of exit k: what the three reductions left.
    MSDKERN_DEVICE void write(int k, Real runner_up) const {
        const RowState<Real> &state = s.state[k];
        const int64_t at = k * call.rows + s.n;
        const Real inverse = state.inverse_t, log_sum = state.log_t, m = state.maximum;
        const int argmax = state.nan != INT32_MAX ? state.nan : state.prediction;
        // Where the largest logit is infinite or NaN, it is the sum.
        const Real top = to_real(row_of<S>(s.call, k, s.n)[argmax]);
        real(call.lse)[at] = top - top == 0 ? m + log_sum : top;
        real(call.confidence)[at] = inverse;
        real(call.margin)[at] =
            call.classes > 1 ? inverse * (1 - exponential(runner_up - m)) : inverse;
        real(call.entropy)[at] = log_sum - state.value * inverse;
        real(call.sum_squares)[at] = state.total * (inverse * inverse);
        call.prediction[at] = argmax;
    }
    MSDKERN_DEVICE void run() {
        s.softmaxes(const_cast<At &>(home), true);
        for (int k = s.team.local; k < s.exits; k += s.team.lanes) {
            s.state[k].inverse_t = 1 / s.exchange.get(k);
            s.state[k].log_t = logarithm(s.exchange.get(k));
            if (s.team.block != 0) s.state[k].prediction = in_block(s.state, 0)[k].prediction;
        }
        s.team.sync();
        sums();
        for (int k = s.team.local; k < s.exits; k += s.team.lanes) {
            s.state[k].total = s.exchange.get(2 * k);
            s.state[k].value = s.exchange.get(2 * k + 1);
        }
        runners_up();
        if (s.team.block != 0) return;
        for (int k = s.team.local; k < s.exits; k += s.team.lanes) write(k, s.exchange.get(k));
    }
};

template <class S, class At>
__global__ void __launch_bounds__(256, roomy(false, sizeof(S)))
    statistics_kernel(const __grid_constant__ msdkern_loss as_loss,
                      const __grid_constant__ msdkern_statistics call,
                      const __grid_constant__ Plan plan) {
    const Team team(plan.lanes, plan.blocks);
    if (plan.blocks > 1) cluster_sync();
    const Cut<S> cut(team, call.classes, plan.vector);
    unsigned char *memory = dyn_smem<unsigned char>() + plan.team_at + team.index * plan.team_bytes;
    Sample<S> s(as_loss, plan, team, cut, memory);
    At home(plan, team);
    const int64_t step = int64_t(gridDim.x / plan.blocks) * plan.teams;
    for (s.n = int64_t(blockIdx.x / plan.blocks) * plan.teams + team.index; s.n < call.rows;
         s.n += step) {
        home.load(as_loss, cut, s.rows, s.n);
        Statistics<S, At> statistics = {call, s, home};
        statistics.run();
        team.sync();
    }
}

template <class S>
cudaError_t run_statistics(const msdkern_statistics &call) {
    msdkern_loss as_loss = {};
    as_loss.place = call.place;
    as_loss.exits = call.exits;
    as_loss.rows = call.rows;
    as_loss.classes = call.classes;
    as_loss.temperature = 1;
    for (int k = 0; k < call.exits; ++k) {
        as_loss.logits[k] = call.logits[k];
        as_loss.stride[k] = call.stride[k];
    }
    const Choice c = Chooser<S>(as_loss, Form::kRows, true).choose();
    const auto kernel = c.rung->home == Home::kShared ? statistics_kernel<S, Shared<S>>
                                                      : statistics_kernel<S, Global<S>>;
    return launch(call.place.stream, c.grid, c.threads, c.plan.blocks, c.shared, kernel, as_loss,
                  call, c.plan);
}

}  // namespace
}  // namespace msdkern

extern "C" int msdkern_cuda_statistics(const msdkern_statistics *call) {
    if (call->exits < 1 || call->exits > MSDKERN_MAX_EXITS || call->rows < 0 || call->classes < 1 ||
        call->classes > msdkern::kMostClasses)
        return MSDKERN_BAD_SIZE;
    if (call->rows == 0) return MSDKERN_OK;
    const msdkern::DeviceGuard guard(call->place.device);
    if (guard.error != cudaSuccess) return msdkern::status_of(guard.error);
    return msdkern::with_dtype(call->dtype, [&](auto s) {
        return msdkern::status_of(msdkern::run_statistics<decltype(s)>(*call));
    });
}

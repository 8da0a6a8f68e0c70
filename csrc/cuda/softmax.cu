// SPDX-License-Identifier: Apache-2.0
// softmax(z / T) or its logarithm for all exits, its backward, and scaling in place.
#include "loss_run.cuh"
#include "ways.h"

namespace msdkern {
namespace {

// In registers ---------------------------------------------------------------------------------

constexpr int held_resident(int bytes) { return bytes == 4 ? 3 : 2; }

// f(reader, exit, row of the exit) for every row of every exit.
template <class S, class F>
MSDKERN_DEVICE void each_row(const msdkern_softmax &call, const Layout &layout, F f) {
    const Team team(layout.lanes, layout.blocks);
    Reader<S> reader(team, *dyn_smem<Meeting<RealOf<S>>>(), call.classes, layout.width);
    const int teams = int(blockDim.x) / layout.lanes;
    const int64_t rows = call.exits * call.rows, step = int64_t(gridDim.x) * teams;
    for (int64_t i = int64_t(blockIdx.x) * teams + team.index; i < rows; i += step) {
        const int k = int(i / call.rows);
        f(reader, k, i - k * call.rows);
    }
}

template <class S>
MSDKERN_DEVICE const S *row_at(const void *rows, int64_t stride, int64_t n) {
    return static_cast<const S *>(rows) + n * stride;
}

template <class S>
MSDKERN_DEVICE double temperature_of(const msdkern_softmax &call) {
    typedef RealOf<S> Real;
    const Real *const there = static_cast<const Real *>(call.temperature_at);
    const double t = there ? double(*there) : call.temperature;
    return t > 0 && t <= 1e300 ? t : double(NAN);
}

// What a thread has of a row becomes f(of it, of the same class of another row).
template <class S, class F>
MSDKERN_DEVICE void combine(uint4 (&raw)[kDeep], const uint4 (&other)[kDeep], F f) {
    constexpr int V = kVector<S>;
#pragma unroll
    for (int i = 0; i < kDeep; ++i) {
        RealOf<S> a[V], b[V];
        unpack<S>(raw[i], a);
        unpack<S>(other[i], b);
        S result[V];
#pragma unroll
        for (int v = 0; v < V; ++v) round_to(f(a[v], b[v]), result[v]);
        memcpy(&raw[i], result, 16);
    }
}

template <class S>
__global__ void __launch_bounds__(kRowThreads, held_resident(sizeof(S)))
    held_softmax_kernel(const __grid_constant__ msdkern_softmax call,
                        const __grid_constant__ Layout layout) {
    typedef RealOf<S> Real;
    const double t = temperature_of<S>(call);
    const Real inverse_t = Real(1 / t), scale = Real(1 / (t * kLogBase<Real>));
    each_row<S>(call, layout, [&](Reader<S> &reader, int k, int64_t n) {
        uint4 raw[kDeep];
        reader.slice.load(row_at<S>(call.input[k], call.stride[k], n), 0, raw);
        Reading<Real> r = nothing_read<Real>();
        reader.template add<kSum>(r, raw, 0, scale);
        r = reader.template meet<kSum>(r, scale);
        const Real inverse = 1 / r.sum, log_sum = logarithm(r.sum);
        combine<S>(raw, raw, [&](Real z, Real) {
            const Real gap = z - r.top;
            return call.log ? gap * inverse_t - log_sum : power(gap * scale) * inverse;
        });
        reader.slice.store(static_cast<S *>(call.output[k]) + n * call.classes, raw);
    });
}

// softmax: p (g - sum_c g p) / T. log_softmax: (g - p sum_c g) / T.
template <class S>
__global__ void __launch_bounds__(kRowThreads, held_resident(sizeof(S)))
    held_softmax_backward_kernel(const __grid_constant__ msdkern_softmax call,
                                 const __grid_constant__ Layout layout) {
    typedef RealOf<S> Real;
    constexpr int V = kVector<S>;
    const Real inverse_t = Real(1 / temperature_of<S>(call));
    each_row<S>(call, layout, [&](Reader<S> &reader, int k, int64_t n) {
        uint4 y[kDeep], g[kDeep];
        reader.slice.load(row_at<S>(call.input[k], call.stride[k], n), 0, y, Real(0));
        reader.slice.load(row_at<S>(call.upstream[k], call.upstream_stride[k], n), 0, g, Real(0));
        Real sum = 0;
#pragma unroll
        for (int i = 0; i < kDeep; ++i) {
            Real p[V], u[V];
            unpack<S>(y[i], p);
            unpack<S>(g[i], u);
#pragma unroll
            for (int v = 0; v < V; ++v) sum += call.log ? u[v] : u[v] * p[v];
        }
        const Real total = reader.sum(sum);
        combine<S>(g, y, [&](Real u, Real p) {
            return (call.log ? u - exponential(p) * total : p * (u - total)) * inverse_t;
        });
        reader.slice.store(static_cast<S *>(call.output[k]) + n * call.classes, g);
    });
}

// In shared memory, or nowhere ------------------------------------------------------------------

// f(sample, home) for every sample, all exits of it at once, as the loss has them: its `gradient`
// takes the outputs.
template <class S, class At, class F>
MSDKERN_DEVICE void each_sample(const msdkern_loss &call, const Plan &plan, F f) {
    const Team team(plan.lanes, plan.blocks);
    if (plan.blocks > 1) cluster_sync();
    Cut<S> cut(team, call.classes, plan.vector, plan.spare);
    unsigned char *memory = dyn_smem<unsigned char>() + plan.team_at + team.index * plan.team_bytes;
    Sample<S> s(call, plan, team, cut, memory);
    At home(plan, team);
    const int64_t step = int64_t(gridDim.x / plan.blocks) * plan.teams;
    for (s.n = int64_t(blockIdx.x / plan.blocks) * plan.teams + team.index; s.n < call.rows;
         s.n += step) {
        cut.lead(s.lead(s.n));
        home.load(call, cut, s.rows, s.n);
        f(s, home);
        team.sync();
    }
}

template <class S, class At>
__global__ void __launch_bounds__(256, roomy(false, sizeof(S)))
    softmax_kernel(const __grid_constant__ msdkern_loss call, const __grid_constant__ Plan plan,
                   int log) {
    typedef RealOf<S> Real;
    constexpr int V = kVector<S>;
    each_sample<S, At>(call, plan, [&](Sample<S> &s, At &home) {
        s.softmaxes(home, false);
        for (int k = 0; k < s.exits; ++k) {
            const Real sum = s.exchange.get(k), inverse = 1 / sum, log_sum = logarithm(sum);
            for (int i = 0; i < s.cut.chunks; ++i) {
                Real x[V], e[V];
                s.terms(home, k, i, x, e);
                for (int v = 0; v < V; ++v) x[v] = log ? x[v] - log_sum : e[v] * inverse;
                s.cut.store(static_cast<S *>(call.gradient[k]) + s.n * call.classes, i, x);
            }
        }
    });
}

// Outputs are the exits, upstream gradients the teachers of `call`.
template <class S, class At>
__global__ void __launch_bounds__(256, roomy(false, sizeof(S)))
    softmax_backward_kernel(const __grid_constant__ msdkern_loss call,
                            const __grid_constant__ Plan plan, int log) {
    typedef RealOf<S> Real;
    constexpr int V = kVector<S>;
    each_sample<S, At>(call, plan, [&](Sample<S> &s, At &home) {
        for (int k = 0; k < s.exits; ++k) {
            Real sum = 0;
            for (int i = 0; i < s.cut.chunks; ++i) {
                Real y[V], g[V];
                unpack<S>(home.raw(k, i), y);
                unpack<S>(home.raw(s.exits + k, i), g);
                for (int v = 0; v < V; ++v)
                    if (s.cut.has(s.class_at(i, v))) sum += log ? g[v] : g[v] * y[v];
            }
            s.exchange.template put<Sum>(s.team, k, sum);
        }
        s.exchange.template finish<Sum>(s.team, s.exits);
        for (int k = 0; k < s.exits; ++k) {
            const Real total = s.exchange.get(k);
            for (int i = 0; i < s.cut.chunks; ++i) {
                Real y[V], g[V];
                unpack<S>(home.raw(k, i), y);
                unpack<S>(home.raw(s.exits + k, i), g);
                for (int v = 0; v < V; ++v)
                    g[v] = (log ? g[v] - exponential(y[v]) * total : y[v] * (g[v] - total)) *
                           s.inverse_t;
                s.cut.store(static_cast<S *>(call.gradient[k]) + s.n * call.classes, i, g);
            }
        }
    });
}

// Launches --------------------------------------------------------------------------------------

template <class S>
cudaError_t run_held(const msdkern_softmax &call, const Way &way, bool backward) {
    uint64_t bytes = joined<S>(call.exits, call.input, call.stride);
    if (backward) bytes |= joined<S>(call.exits, call.upstream, call.upstream_stride);
    for (int k = 0; k < call.exits; ++k)
        bytes |= reinterpret_cast<uintptr_t>(call.output[k]) | uint64_t(call.classes) * sizeof(S);
    const RowChoice c = choose<S>(machine(call.place.device), way, call.exits * call.rows, bytes);
    return launch(call.place.stream, c.grid, c.threads, 1, sizeof(Meeting<RealOf<S>>),
                  backward ? held_softmax_backward_kernel<S> : held_softmax_kernel<S>, call,
                  c.layout);
}

template <class S>
cudaError_t run_softmax(const msdkern_loss &call, bool backward, int log) {
    const Choice c = Chooser<S>(call, Form::kRows, true).choose();
    const bool shared = c.rung->home == Home::kShared;
    const auto kernel = backward ? shared ? softmax_backward_kernel<S, Shared<S>>
                                          : softmax_backward_kernel<S, Global<S>>
                        : shared ? softmax_kernel<S, Shared<S>>
                                 : softmax_kernel<S, Global<S>>;
    return launch(call.place.stream, c.grid, c.threads, c.plan.blocks, c.shared, kernel, call,
                  c.plan, log);
}

// The call as the loss would have it.
msdkern_loss as_loss(const msdkern_softmax &c, bool backward) {
    msdkern_loss call = {};
    call.place = c.place;
    call.dtype = c.dtype;
    call.exits = c.exits;
    call.teachers = backward ? c.exits : 0;
    call.rows = c.rows;
    call.classes = c.classes;
    call.temperature = c.temperature;
    call.temperature_at = c.temperature_at;
    call.pairs = MSDKERN_PAIRS_LAST;  // any: T counts
    for (int k = 0; k < c.exits; ++k) {
        call.logits[k] = c.input[k];
        call.stride[k] = c.stride[k];
        call.gradient[k] = c.output[k];
        if (!backward) continue;
        call.logits[c.exits + k] = c.upstream[k];
        call.stride[c.exits + k] = c.upstream_stride[k];
    }
    return call;
}

int any_softmax(const msdkern_softmax &c, bool backward) {
    if (c.exits < 1 || c.exits > MSDKERN_MAX_EXITS || c.rows < 0 || c.classes < 1 ||
        c.classes > kMostClasses)
        return MSDKERN_BAD_SIZE;
    if (!c.temperature_at && !(c.temperature > 0 && c.temperature <= 1e300))
        return MSDKERN_BAD_TEMPERATURE;
    if (c.rows == 0) return MSDKERN_OK;
    const DeviceGuard guard(c.place.device);
    if (guard.error != cudaSuccess) return status_of(guard.error);
    return with_dtype(c.dtype, [&](auto s) {
        typedef decltype(s) S;
        // One piece of a row is what a thread holds.
        if (const Way *way = way_of<S>(c.classes, false, 1))
            return status_of(run_held<S>(c, *way, backward));
        return status_of(run_softmax<S>(as_loss(c, backward), backward, c.log));
    });
}

// data *= factor, nothing where the factor is 1.
template <class S>
__global__ void __launch_bounds__(256) scale_kernel(const __grid_constant__ msdkern_scale call) {
    typedef RealOf<S> Real;
    constexpr int V = kVector<S>;
    const double given =
        call.factor_at ? double(*static_cast<const Real *>(call.factor_at)) : call.factor;
    if (given == 1) return;
    const Real factor = Real(given);
    const int64_t thread = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    const int64_t threads = int64_t(gridDim.x) * blockDim.x;
    for (int t = 0; t < call.tensors; ++t) {
        S *const data = static_cast<S *>(call.data[t]);
        const bool vector = reinterpret_cast<uintptr_t>(data) % 16 == 0;
        const int64_t whole = vector ? call.size[t] / V : 0;
        for (int64_t i = thread; i < whole; i += threads) {
            Real x[V];
            unpack<S>(reinterpret_cast<const uint4 *>(data)[i], x);
            S y[V];
            for (int v = 0; v < V; ++v) round_to(x[v] * factor, y[v]);
            uint4 raw;
            memcpy(&raw, y, 16);
            reinterpret_cast<uint4 *>(data)[i] = raw;
        }
        for (int64_t i = whole * V + thread; i < call.size[t]; i += threads)
            round_to(to_real(data[i]) * factor, data[i]);
    }
}

template <class S>
cudaError_t run_scale(const msdkern_scale &call) {
    int64_t most = 0;
    for (int t = 0; t < call.tensors; ++t) most = call.size[t] > most ? call.size[t] : most;
    const int64_t blocks = (most + 256 * kVector<S> - 1) / (256 * kVector<S>);
    const int64_t room = int64_t(machine(call.place.device).processors) * 8;
    if (blocks == 0) return cudaSuccess;
    return launch(call.place.stream, blocks < room ? blocks : room, 256, 1, 0, scale_kernel<S>,
                  call);
}

}  // namespace
}  // namespace msdkern

extern "C" {

int msdkern_cuda_softmax(const msdkern_softmax *call) { return msdkern::any_softmax(*call, false); }
int msdkern_cuda_softmax_backward(const msdkern_softmax *call) {
    return msdkern::any_softmax(*call, true);
}
int msdkern_cuda_scale(const msdkern_scale *call) {
    if (call->tensors < 0 || call->tensors > MSDKERN_MAX_EXITS) return MSDKERN_BAD_SIZE;
    if (!call->factor_at && call->factor == 1) return MSDKERN_OK;
    const msdkern::DeviceGuard guard(call->place.device);
    if (guard.error != cudaSuccess) return msdkern::status_of(guard.error);
    return msdkern::with_dtype(call->dtype, [&](auto s) {
        return msdkern::status_of(msdkern::run_scale<decltype(s)>(*call));
    });
}

}  // extern "C"

// SPDX-License-Identifier: Apache-2.0
// The loss family on CUDA devices: persistent blocks whose teams take one sample after another, and
// whose last block adds up what all found.
#pragma once

#include "named.cuh"
#include "sweeps.cuh"
#include "tally.h"
#include "tile.cuh"

namespace msdkern {

struct Factors {
    double ce, rows, mean_ce, mean_rows;  // r of the two parts, and what r is for means
};

// In shared memory, before the teams.
struct Block {
    double scratch[32];
    Factors factor;
    int last;
};
constexpr int kBlockBytes = 320;
static_assert(sizeof(Block) <= kBlockBytes, "teams come after it");

MSDKERN_DEVICE double reciprocal(double x) { return x > 0 ? 1 / x : 0; }

// (3), (4) Valid rows and the sum of their labels' class weights, from all labels.
template <class Real>
MSDKERN_DEVICE void count_labels(const msdkern_loss &call, double *scratch, double &rows,
                                 double &weights) {
    const Real *weight = static_cast<const Real *>(call.class_weight);
    double mine = 0, mine_weighted = 0;
    for (int64_t n = threadIdx.x; n < call.rows; n += blockDim.x) {
        const int64_t label = call.label[n];
        if (label == call.ignore_index) continue;
        mine += 1;
        if (weight && label >= 0 && label < call.classes) mine_weighted += double(weight[label]);
    }
    rows = block_sum(mine, scratch);
    weights = weight ? block_sum(mine_weighted, scratch) : rows;
}

template <class Real>
__global__ void __launch_bounds__(1024)
    count_kernel(const __grid_constant__ msdkern_loss call, Tally *tally) {
    double rows, weights;
    count_labels<Real>(call, dyn_smem<double>(), rows, weights);
    if (threadIdx.x != 0) return;
    tally->rows = rows;
    tally->weights = weights;
}

template <class Real>
MSDKERN_DEVICE Factors factors(const msdkern_loss &call, const Plan &plan, double *scratch) {
    double rows = double(call.rows), weights = rows;
    if (call.label) {
        if (call.rows <= plan.counted) {
            count_labels<Real>(call, scratch, rows, weights);
        } else {
            rows = static_cast<const Tally *>(call.place.workspace)->rows;
            weights = static_cast<const Tally *>(call.place.workspace)->weights;
        }
    }
    Factors f = {1, 1, reciprocal(weights), reciprocal(rows)};
    double given = call.normalizer;
    if (call.normalizer_at) given = double(*static_cast<const Real *>(call.normalizer_at));
    if (call.normalizer_at || given != 0)
        f.ce = f.rows = given > 0 ? 1 / given : given == 0 ? 0 : double(NAN);
    else if (call.mean)
        f.ce = f.mean_ce, f.rows = f.mean_rows;
    return f;
}

template <class S, class Home>
struct LossKernel {
    typedef RealOf<S> Real;
    const msdkern_loss &call;
    const Plan &plan;
    const Form form;
    const Team &team;
    const Factors &factor;
    Sample<S> s;
    Home home;
    double *sums;  // this team's: CE, weighted CE and divergence per exit, and the matrix

    MSDKERN_DEVICE LossKernel(const msdkern_loss &c, const Plan &p, Form f, const Team &t,
                              Cut<S> &cut, const Factors &factor_, unsigned char *memory)
        : call(c),
          plan(p),
          form(f),
          team(t),
          factor(factor_),
          s(c, p, t, cut, memory),
          home(p, t),
          sums(reinterpret_cast<double *>(memory + p.team_bytes) - p.fields) {
#pragma unroll 1
        for (int i = team.local; i < plan.fields; i += team.lanes) sums[i] = 0;
        if (call.pairs != MSDKERN_PAIRS_DENSE) named_weights();
        team.sync();
    }
    static MSDKERN_DEVICE const Real *real(const void *p) { return static_cast<const Real *>(p); }
    static MSDKERN_DEVICE Real *real(void *p) { return static_cast<Real *>(p); }
    MSDKERN_DEVICE bool leads() const { return team.block == 0; }
    MSDKERN_DEVICE int64_t at(int k) const { return k * call.rows + s.n; }

    // Student i's divergence is share sum_j w_ij D_ij with sum_j w_ij = n. Mutual sums count the
    // student's own share, so that one sum serves all students.
    MSDKERN_DEVICE void named_weights() {
#pragma unroll 1
        for (int i = team.local; i < s.exits; i += team.lanes) {
            Real n = call.pairs == MSDKERN_PAIRS_MUTUAL, share = 0;
#pragma unroll 1
            for (int j = 0; j < s.rows; ++j) {
                const Real w = named_weight<Real>(call.pairs, s.exits, i, j);
                s.weight[i * s.rows + j] = w;
                n += w != 0;
                share = larger(share, w);
            }
            s.state[i].n = n;
            s.state[i].share = share;
        }
    }
    MSDKERN_DEVICE void dense_weights() {
        const Real *given = real(call.pair_weight);
#pragma unroll 1
        for (int i = team.local; i < s.exits; i += team.lanes) {
            Real n = 0;
#pragma unroll 1
            for (int j = 0; j < s.rows; ++j) {
                const int64_t pair = i * s.rows + j;
                const Real w = given[call.pair_weight_per_row ? pair * call.rows + s.n : pair];
                s.weight[pair] = w;
                n += w;
            }
            s.state[i].n = n;
            s.state[i].share = 1;
        }
    }
    MSDKERN_DEVICE Real exit_weight(int k) const {
        if (!call.exit_weight) return 1;
        return real(call.exit_weight)[call.exit_weight_per_row ? at(k) : k];
    }

    // (1)-(7) for sample n; `next` comes after it.
    MSDKERN_DEVICE void run(int64_t n, int64_t next) {
        const int64_t label = call.label ? call.label[n] : -1;
        const bool ignored = call.label && label == call.ignore_index;
        const bool bad = call.label && !ignored && (label < 0 || label >= call.classes);
        s.n = n;
        s.cut.lead(s.lead(n));
        s.label = ignored || bad ? -1 : int(label);
        if (bad && leads() && team.local == 0 && call.place.workspace)
            atomicOr(&static_cast<Tally *>(call.place.workspace)->bad_label, 1u);
        if (ignored && form != Form::kScalar) {
            if constexpr (Home::kTile) home.drop();
            return skip();
        }
        home.load(call, s.cut, s.rows, n);
        softmaxes(form == Form::kScalar);
#pragma unroll 1
        for (int r = team.local; r < s.rows; r += team.lanes) normalise(r, next);
        if (form == Form::kScalar && leads()) predictions();
        if (ignored) {
            team.sync();
            return skip();
        }
        if (call.pairs == MSDKERN_PAIRS_DENSE) dense_weights();
#pragma unroll 1
        for (int k = team.local; k < s.exits; k += team.lanes) cross_entropy(k, bad);
        team.sync();
        if (s.divergent) finish_logs();
        divergences(next);
#pragma unroll 1
        for (int k = team.local; k < s.exits; k += team.lanes) report(k);
        team.sync();  // the next sample begins anew
    }
    MSDKERN_DEVICE void skip() {
        s.zero_gradients();
        if (form != Form::kRows || !leads()) return;
#pragma unroll 1
        for (int k = team.local; k < s.exits; k += team.lanes)
            real(call.row_cross_entropy)[at(k)] = real(call.row_divergence)[at(k)] = 0;
    }
    MSDKERN_DEVICE void softmaxes(bool predicts) {
        if constexpr (Home::kTile)
            TileSums<S, Home>{s, home}.softmaxes(predicts);
        else
            s.softmaxes(home, predicts);
    }
    // The logarithm of a sum in double: rounded, it would leave a divergence of near-identical
    // exits, which is of second order, with an error of first order.
    MSDKERN_DEVICE void normalise(int r, int64_t next) const {
        RowState<Real> &state = s.state[r];
        if constexpr (Home::kTile) {
            state.from = row_of<S>(call, r, Home::kOnline ? s.n : next);
            if (r < s.exits) state.to = s.gradient_of(r);
        } else {
            state.drift = state.one_drift = 0;
        }
        const Real sum = s.exchange.get(r);
        state.terms.inverse = 1 / sum;
        state.inverse_t = state.terms.inverse * exponential2(state.drift);
        state.slack = Real(1 - double(state.terms.inverse) * double(sum));
        if (s.divergent) state.log = log(double(sum)) - kLn2 * double(state.drift);
    }
    MSDKERN_DEVICE void finish_logs() const {
        // Any reference that all rows of a sample share will do; the deepest exit may hold NaN.
        const RowState<Real> &deepest = s.state[s.exits - 1];
        const bool known = deepest.log - deepest.log == 0;
        const double log = known ? deepest.log : 0, drift = known ? double(deepest.drift) : 0;
#pragma unroll 1
        for (int r = team.local; r < s.rows; r += team.lanes) {
            RowState<Real> &state = s.state[r];
            const double gap = state.log - log;
            const double level = gap + kLn2 * (double(state.drift) - drift);
            state.log_t = Real(state.log);
            state.gap = Real(gap);
            state.level = Real(level);
            state.slack += Real(level - double(state.level));
        }
        team.sync();
    }
    MSDKERN_DEVICE void predictions() const {
#pragma unroll 1
        for (int k = team.local; k < s.exits; k += team.lanes) {
            const RowState<Real> &state = s.state[k];
            real(call.confidence)[at(k)] =
                exponential2(state.one_drift) / s.exchange.get(s.rows + k);
            call.prediction[at(k)] = state.nan != INT32_MAX ? state.nan : state.prediction;
        }
    }
    // CE_k[n], and the scales of its gradient.
    MSDKERN_DEVICE void cross_entropy(int k, bool bad) const {
        RowState<Real> &state = s.state[k];
        const Real one = s.exchange.get(s.rows + k);
        const Real log_one = logarithm(one) - Real(kLn2) * state.one_drift;
        Real mass = 0, ce = 0;
        if (s.dense_target) {
            mass = s.exchange.get(2 * s.rows + s.exits);
            ce = s.exchange.get(2 * s.rows + k) + mass * log_one;
        } else if (s.label >= 0) {
            mass = call.class_weight ? real(call.class_weight)[s.label] : Real(1);
            const Real z = to_real(row_of<S>(call, k, s.n)[s.label]);
            ce = mass * (log_one - (z - state.maximum));
        }
        if (bad) mass = ce = Real(NAN);
        Real upstream = Real(factor.ce), of_divergence = Real(factor.rows);
        if (form == Form::kRowsBackward) {
            upstream = real(call.upstream_cross_entropy)[at(k)];
            of_divergence = real(call.upstream_divergence)[at(k)];
        }
        const Real a = call.label || call.target ? upstream * exit_weight(k) : Real(0);
        state.p_scale = a * mass / one;
        state.terms.p_scale = state.p_scale;
        for (int i = 0; i < s.power; ++i) state.terms.p_scale *= s.exchange.get(k);
        state.mass_scale = s.dense_target ? a : a * mass;
        state.pair_scale =
            of_divergence * s.scale * (plan.general ? Real(1) : state.share * s.inverse_t);
        state.value = 0;
        state.ce = ce;
    }
    MSDKERN_DEVICE void divergences(int64_t next) {
        if constexpr (Home::kTile) {
            Tile<S, Home>{s, home}.sweep(next);
        } else {
            if (plan.general) return two_sweeps();
            sweep_students(s, home);
        }
        team.sync();
        if (s.divergent && any_spoilt()) {
            team.sync();
            Careful<S>{s}.values();
        }
    }
    // Values, then gradients.
    MSDKERN_DEVICE void two_sweeps() {
        if (Named<S, Home>::serves(call)) {
            Named<S, Home> named(s, home);
            if (named.values()) {
                if (s.gradient) named.gradients();
                return;
            }
        }
        double *matrix = call.pair_divergence && leads() ? sums + 3 * s.exits : nullptr;
        const Pairs<S, Home> pairs = {s, home, matrix};
        pairs.values();
        if (s.gradient) pairs.gradients();
    }
    MSDKERN_DEVICE bool any_spoilt() const {
        bool any = false;
#pragma unroll 1
        for (int k = 0; k < s.exits; ++k) any |= spoilt(s.state[k].value);
        return any;
    }
    MSDKERN_DEVICE void report(int k) const {
        Real value = s.state[k].value;
#pragma unroll 1
        for (int j = 0; s.divergent && j < s.rows; ++j) {
            const Real w = s.weight[k * s.rows + j];
            if (w != 0) value -= w * s.error(k, j);  // a teacher without weight may hold NaN
        }
        if (!leads()) return;
        const Real ce = s.state[k].ce, weighted = exit_weight(k) * ce, part = s.scale * value;
        if (form == Form::kScalar) {
            sums[k] += double(ce);
            sums[s.exits + k] += double(weighted);
            sums[2 * s.exits + k] += double(s.divergent ? part : Real(0));
        } else if (form == Form::kRows) {
            real(call.row_cross_entropy)[at(k)] = weighted;
            real(call.row_divergence)[at(k)] = s.divergent ? part : Real(0);
        }
    }
};

// Adds up the teams of this block; then, in the block that is the last to come here, all blocks.
// Both in an order that depends on the grid alone.
template <class Real>
MSDKERN_DEVICE void add_up(const msdkern_loss &call, const Plan &plan, const Factors &factor,
                           Block &block) {
    Tally *tally = static_cast<Tally *>(call.place.workspace);
    double *all =
        reinterpret_cast<double *>(static_cast<char *>(call.place.workspace) + kTallyBytes);
    const int blocks = int(gridDim.x) / plan.blocks, mine = int(blockIdx.x) / plan.blocks;
    const auto sums_of = [&](int team) {
        unsigned char *end =
            dyn_smem<unsigned char>() + plan.team_at + (team + 1) * plan.team_bytes;
        return reinterpret_cast<double *>(end) - plan.fields;
    };
    __syncthreads();
#pragma unroll 1
    for (int f = threadIdx.x; f < plan.fields; f += blockDim.x) {
        double sum = 0;
#pragma unroll 1
        for (int t = 0; t < plan.teams; ++t) sum += sums_of(t)[f];
        all[int64_t(mine) * plan.fields + f] = sum;
    }
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) block.last = atomicAdd(&tally->blocks, 1u) == unsigned(blocks) - 1;
    __syncthreads();
    if (!block.last) return;
    __threadfence();
    double *const total = sums_of(0);
    const Team warp(32, 1);
#pragma unroll 1
    for (int f = warp.index; f < plan.fields; f += int(blockDim.x) / 32) {
        double sum = 0;
        for (int b = warp.local; b < blocks; b += 32)
            sum += __ldcg(all + int64_t(b) * plan.fields + f);
        sum = over_lanes<Sum>(warp, sum);
        if (warp.local == 0) total[f] = sum;
    }
    __syncthreads();
    const int exits = call.exits, pairs = plan.fields - 3 * exits;
#pragma unroll 1
    for (int k = threadIdx.x; k < exits; k += blockDim.x) {
        static_cast<Real *>(call.cross_entropy)[k] = Real(factor.mean_ce * total[k]);
        static_cast<Real *>(call.divergence_mean)[k] =
            Real(factor.mean_rows * total[2 * exits + k]);
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < pairs; i += blockDim.x)
        static_cast<Real *>(call.pair_divergence)[i] =
            Real(factor.mean_rows * total[3 * exits + i]);
    if (threadIdx.x != 0) return;
    double loss = 0;
#pragma unroll 1
    for (int k = 0; k < exits; ++k)
        loss += factor.ce * total[exits + k] + factor.rows * total[2 * exits + k];
    *static_cast<Real *>(call.loss) = Real(loss);
    tally->blocks = 0;
}

template <class S, class Home>
MSDKERN_DEVICE void take_samples(const msdkern_loss &call, const Plan &plan, Form form) {
    Block &block = *dyn_smem<Block>();
    Team team(plan.lanes, plan.blocks);
    if (plan.blocks > 1) cluster_sync();  // nobody writes to a block that has not begun
    Factors factor = {1, 1, 1, 1};
    if (form == Form::kScalar) factor = factors<RealOf<S>>(call, plan, block.scratch);
    if (threadIdx.x == 0) block.factor = factor;
    __syncthreads();
    Cut<S> cut(team, call.classes, plan.vector, plan.spare);
    unsigned char *memory = dyn_smem<unsigned char>() + plan.team_at + team.index * plan.team_bytes;
    LossKernel<S, Home> kernel(call, plan, form, team, cut, block.factor, memory);
    const int64_t first = int64_t(blockIdx.x / plan.blocks) * plan.teams + team.index;
    const int64_t step = int64_t(gridDim.x / plan.blocks) * plan.teams;
    for (int64_t n = first; n < call.rows; n += step) {
        renew(team.lanes), renew(kernel.s.exchange.slots);
        kernel.run(n, n + step);
    }
    if (form == Form::kScalar && team.block == 0)
        add_up<RealOf<S>>(call, plan, block.factor, block);
}

template <class S, class Home, int kThreads, int kResident>
__global__ void __launch_bounds__(kThreads, kResident)
    loss_kernel(const __grid_constant__ msdkern_loss call, const __grid_constant__ Plan plan,
                Form form) {
    take_samples<S, Home>(call, plan, form);
}

}  // namespace msdkern

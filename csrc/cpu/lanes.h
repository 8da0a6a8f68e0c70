// SPDX-License-Identifier: Apache-2.0
// Short rows: as many samples at once as a vector has lanes. What belongs to a row
// (logarithms, scales, sums over the batch) is worked out for all samples together, one per lane;
// how their classes are is the layout's: columns.h or in_place.h. Forward KL and soft cross entropy
// with detached teachers, and cross entropy alone; everything else goes row by row.
#pragma once

#include "general.h"
#include "group.h"
#include "targets.h"

namespace MSDKERN_NAMESPACE {

// A group of samples as a layout sees it. L is the Loss<S> of loss.h, which knows the call; the
// arrays of g and the constants of s are [rows][lanes].
template <class S, class L>
struct LaneGroup {
    typedef typename Kind<S>::Real Real;
    typedef VecOf<Real> V;
    static const int W = kLanes<Real>;

    const L &loss;
    const Group<Real> g;
    OwnSweep<Real, V> s;
    V valid;  // 1 where there is a sample and it counts, 0 elsewhere
    LaneGroup(const L &l, void *memory, Real *weight)
        : loss(l), g(memory, l.rows * W, 1, W), s(l.power, l.rate) {
        loss.prepare(s, weight);
    }
};

// A Layout has, for samples first to first + count: softmaxes(), which leaves maxima and sums of
// exponentials in g, for lanes without a sample finite ones; and sweep(), which writes gradients
// and leaves values in s.value, for lanes that count.
template <class S, class L, template <class, class> class Layout>
class Lanes {
    typedef typename Kind<S>::Real Real;
    typedef VecOf<Real> V;
    typedef typename Vector<Real>::Int I;
    static const int W = kLanes<Real>;

    const L &loss;
    const msdkern_loss &call;
    Layout<S, L> layout;
    LaneGroup<S, L> x;

 public:
    // Scratch memory: what a group's rows take, and their scalars.
    static size_t bytes(const L &l) {
        return Layout<S, L>::bytes(l) + Group<Real>::bytes(l.rows * W);
    }
    Lanes(const L &l, void *memory, Real *weight)
        : loss(l),
          call(l.call),
          layout(l, memory, weight),
          x(l, static_cast<char *>(memory) + Layout<S, L>::bytes(l), weight) {
        for (int k = 0; k < loss.exits; ++k) sums[k] = Sums();
    }

    // Samples first to last, W of them at most. Those that must go row by row are left: a bit each.
    unsigned group(int64_t first, int64_t last, int64_t end) {
        const int count = int(last - first);
        layout.softmaxes(x, first, count, end);
        if (loss.divergent) normalize_at_t(x.g, W, loss.rows, loss.exits);
        normalize_at_one(x.g, W * loss.rows);
        take_rows(x.g, 0, W, x.s);  // the arrays are aligned: vectors of samples
        V ce[MSDKERN_MAX_EXITS];
        scales(first, count, ce);
        for (int k = 0; k < loss.exits; ++k) x.s.value[k] = V{};
        if (loss.divergent || loss.gradient) layout.sweep(x, first, count);
        if (loss.divergent) correct_values(x.s, call.divergence);
        const unsigned left = record(first, count, ce);
        if (call.label)
            for (int64_t n = first; n < last; ++n)
                if (loss.targets.ignored(n)) loss.leave_out(n);
        return left;
    }
    // The sums over all groups so far.
    void add_to(Partial &partial) const {
        for (int k = 0; k < loss.exits; ++k) {
            partial.cross_entropy[k] += sum_of(sums[k].cross_entropy);
            partial.weighted_ce[k] += sum_of(sums[k].weighted_ce);
            partial.divergence[k] += sum_of(sums[k].divergence);
        }
    }

 private:
    // In double, a sum per lane.
    typedef typename Vector<Real>::Wide Wide;
    struct Sums {
        Wide cross_entropy, weighted_ce, divergence;
    };
    Sums sums[MSDKERN_MAX_EXITS];

    static Wide wide(V v) { return __builtin_convertvector(v, Wide); }
    static double sum_of(const Wide &v) {
        double total = 0;
        for (int lane = 0; lane < W; ++lane) total += v[lane];
        return total;
    }
    // The numbers of exit k for samples first to first + count, from an array [exits][rows].
    V per_row(const void *array, int k, int64_t first, int count) const {
        const Real *const at = static_cast<const Real *>(array) + k * call.rows + first;
        return count == W ? load(at) : load_partial(at, count, Real(0));
    }
    void put_rows(void *array, int k, int64_t first, int count, V v) const {
        Real *const at = static_cast<Real *>(array) + k * call.rows + first;
        count == W ? store(at, v) : store_partial(at, count, v);
    }

    V exit_weight(int k, int64_t first, int count) const {
        return call.exit_weight_per_row ? per_row(call.exit_weight, k, first, count)
                                        : splat(loss.targets.exit_weight(k, first));
    }
    // Cross entropies, and what scales the gradients: 0 for samples that do not count.
    void scales(int64_t first, int count, V *ce) {
        const auto &targets = loss.targets;
        const bool backward = loss.form == Form::kRowsBackward;
        Real counts[W] = {}, total[W] = {};
        for (int lane = 0; lane < count; ++lane) {
            if (targets.ignored(first + lane)) continue;
            counts[lane] = 1;
            total[lane] = targets.mass(first + lane, nullptr, 0);
        }
        x.valid = load(counts);
        for (int k = 0; k < loss.exits; ++k) {
            Real z[W] = {};
            for (int lane = 0; lane < count; ++lane)
                if (call.label && counts[lane] != 0)
                    z[lane] =
                        targets.number(loss.row_of(k, first + lane) + call.label[first + lane]);
            const int i = x.g.at(0, k);
            const V upstream = backward ? per_row(call.upstream_cross_entropy, k, first, count)
                                        : splat(targets.factor);
            const auto c = targets.of_label(load(z), load(x.g.maximum + i), load(x.g.log_one + i),
                                            load(x.g.inverse_one + i), load(total),
                                            upstream * exit_weight(k, first, count));
            // The logits of a row that does not count may be anything: 0, not 0 times that.
            const auto counted = (call.label ? x.valid : V{}) != V{};
            ce[k] = counted ? c.value : V{};
            x.s.row[k].p_scale = counted ? c.p_scale : V{};
            x.s.row[k].mass_scale = counted ? c.mass_scale : V{};
            const V d = backward ? per_row(call.upstream_divergence, k, first, count)
                                 : splat(loss.row_factor);
            x.s.row[k].pair_scale = x.valid * d * (loss.scale * x.s.share[k] * loss.inverse_t);
        }
    }

    unsigned record(int64_t first, int count, const V *ce) {
        if (loss.form == Form::kScalar) predictions(first, count);
        // A class masked with -inf makes running sums inf - inf.
        auto finite = x.valid != V{};
        for (int k = 0; k < loss.exits; ++k) finite &= x.s.value[k] - x.s.value[k] == V{};
        for (int k = 0; k < loss.exits; ++k) {
            const V weighted = exit_weight(k, first, count) * ce[k], d = loss.scale * x.s.value[k];
            if (loss.form == Form::kScalar) {
                sums[k].cross_entropy += wide(finite ? ce[k] : V{});
                sums[k].weighted_ce += wide(finite ? weighted : V{});
                sums[k].divergence += wide(finite ? d : V{});
            } else if (loss.form == Form::kRows) {
                put_rows(call.row_cross_entropy, k, first, count, weighted);
                put_rows(call.row_divergence, k, first, count, d);
            }
        }
        return lanes_of(I(x.valid != V{})) & ~lanes_of(I(finite));
    }
    void predictions(int64_t first, int count) const {
        for (int k = 0; k < loss.exits; ++k) {
            const V confidence = load(x.g.inverse_one + x.g.at(0, k));
            if (any(I(confidence != confidence))) {
                for (int lane = 0; lane < count; ++lane) loss.predictions(x.g, lane, first + lane);
                return;
            }
            put_rows(call.confidence, k, first, count, confidence);
            memcpy(call.prediction + k * call.rows + first, x.g.argmax + x.g.at(0, k),
                   size_t(count) * sizeof(int64_t));
        }
    }
};

}  // namespace MSDKERN_NAMESPACE

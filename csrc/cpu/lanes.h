// SPDX-License-Identifier: Apache-2.0
// Few classes: as many samples at once as a vector has lanes, one sample per lane. Rows are turned
// into columns, so that sums and maxima over classes need nothing across lanes, and what belongs to
// a row (logarithms, scales) is worked out for all samples together. Forward KL and soft cross
// entropy with detached teachers, and cross entropy alone; everything else goes row by row.
#pragma once

#include "general.h"
#include "group.h"
#include "targets.h"

namespace MSDKERN_NAMESPACE {

// L is the Loss<S> of loss.h, which knows the call.
template <class S, class L>
class Lanes {
    typedef typename Kind<S>::Real Real;
    typedef VecOf<Real> V;
    typedef typename Vector<Real>::Int I;
    static const int W = kLanes<Real>;
    static const int64_t kSpan = 32;  // classes that are added up before the sums are

    const L &loss;
    const msdkern_loss &call;
    const Group<Real> g;
    Real *const kept;
    Sweep<Real, V> s;

    // Classes of row r, a vector of samples each: z and, in its place, the gradient; e; e at 1.
    static int64_t array_size(const L &l) { return apart<Real>(l.classes * W); }
    static int64_t row_size(const L &l) { return (1 + l.arrays()) * array_size(l); }
    Real *z_of(int r) const { return kept + r * row_size(loss); }
    Real *e_of(int r) const { return z_of(r) + array_size(loss); }
    Real *one_of(int r) const { return e_of(r) + (loss.arrays() - 1) * array_size(loss); }

 public:
    // Scratch memory: what a group's rows take, and their scalars.
    static size_t bytes(const L &l) {
        return size_t(l.rows * row_size(l)) * sizeof(Real) + Group<Real>::bytes(l.rows * W);
    }
    // Where it is the faster way, as measured.
    static bool fit(int64_t rows, int64_t classes) {
        return classes <= 8 * W && rows * classes * W * int64_t(sizeof(Real)) <= (96 << 10);
    }

    Lanes(const L &l, void *memory, Real *weight)
        : loss(l),
          call(l.call),
          g(static_cast<Real *>(memory) + l.rows * row_size(l), l.rows * W, 1, W),
          kept(static_cast<Real *>(memory)),
          s(l.power, l.rate) {
        loss.prepare(s, weight);
        for (int k = 0; k < loss.exits; ++k) sums[k] = Sums();
    }

    // Samples first to last, W of them at most. Those that must go row by row are left: a bit each.
    unsigned group(int64_t first, int64_t last) {
        const int count = int(last - first);
        for (int r = 0; r < loss.rows; ++r) softmax(r, read(r, first, count));
        if (loss.divergent) normalize_at_t(g, W, loss.rows, loss.exits);
        normalize_at_one(g, W * loss.rows);
        take_rows(g, 0, W, s);  // the arrays are [rows][lanes] and aligned: vectors of samples
        V ce[MSDKERN_MAX_EXITS];
        scales(first, count, ce);
        sweep(first, count);
        if (loss.divergent) correct_values(s, call.divergence);
        const unsigned left = record(first, count, ce);
        if (loss.gradient) subtract_labels(first, count);
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
    V valid;  // 1 where there is a sample and it counts, 0 elsewhere

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

    // The largest logit of each sample and its lowest class.
    struct Tops {
        V m = splat(Real(-__builtin_inf()));
        I at = I{}, here = I{};
        INLINE_MEMBER void add(V z) {
            at = z > m ? here : at;
            m = maximum(z, m);
            here += 1;
        }
    };
    // Row r of every sample; lanes without one repeat the last. Whole blocks of W classes: loads
    // and shuffles of one overlap with the comparisons of another.
    Tops read(int r, int64_t first, int count) const {
        Real *const to = z_of(r);
        const int64_t classes = loss.classes;
        const S *from[W];
        for (int lane = 0; lane < W; ++lane)
            from[lane] = loss.row_of(r, first + least(lane, count - 1));
        V v[W];
        Tops tops;
        int64_t c = 0;
        for (; c + W <= classes; c += W) {
            UNROLL for (int lane = 0; lane < W; ++lane) v[lane] = load(from[lane] + c);
            transpose(v);
            UNROLL for (int i = 0; i < W; ++i) {
                store(to + (c + i) * W, v[i]);
                tops.add(v[i]);
            }
        }
        const int rest = int(classes - c);
        if (rest == 0) return tops;
        for (int lane = 0; lane < W; ++lane) v[lane] = load_partial(from[lane] + c, rest, Real(0));
        transpose(v);
        for (int i = 0; i < rest; ++i) {
            store(to + (c + i) * W, v[i]);
            tops.add(v[i]);
        }
        return tops;
    }

    void softmax(int r, const Tops &tops) const {
        const Real *const from = z_of(r);
        const V m = tops.m;
        const int first = g.at(0, r);
        store(g.maximum + first, m);
        for (int lane = 0; lane < W; ++lane) g.argmax[first + lane] = tops.at[lane];
        RowSums<V> sums = {};
        with_power(loss.power, [&](auto power) __attribute__((always_inline)) {
            for (int64_t c = 0; c < loss.classes; c += kSpan) {
                const int64_t count = least(kSpan, loss.classes - c);
                const RowStore<Real> out = {e_of(r) + c * W, one_of(r) + c * W};
                sums += exponentials<decltype(power)::value, true>(from + c * W, count * W, m,
                                                                   loss.rate, out);
            }
        });
        store(g.sum_t + first, sums.at_t);
        store(g.sum_one + first, sums.at_one);
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
        valid = load(counts);
        for (int k = 0; k < loss.exits; ++k) {
            Real z[W] = {};
            for (int lane = 0; lane < count; ++lane)
                if (call.label && counts[lane] != 0)
                    z[lane] =
                        targets.number(loss.row_of(k, first + lane) + call.label[first + lane]);
            const int i = g.at(0, k);
            const V upstream = backward ? per_row(call.upstream_cross_entropy, k, first, count)
                                        : splat(targets.factor);
            const auto c = targets.of_label(load(z), load(g.maximum + i), load(g.log_one + i),
                                            load(g.inverse_one + i), load(total),
                                            upstream * exit_weight(k, first, count));
            // The logits of a row that does not count may be anything: 0, not 0 times that.
            const auto counted = (call.label ? valid : V{}) != V{};
            ce[k] = counted ? c.value : V{};
            s.row[k].p_scale = counted ? c.p_scale : V{};
            s.row[k].mass_scale = counted ? c.mass_scale : V{};
            const V d = backward ? per_row(call.upstream_divergence, k, first, count)
                                 : splat(loss.row_factor);
            s.row[k].pair_scale = valid * d * (loss.scale * s.share[k] * loss.inverse_t);
        }
    }

    // Blocks of W classes, each of which is turned back into rows while it is at hand.
    void sweep(int64_t first, int count) {
        for (int k = 0; k < loss.exits; ++k) s.value[k] = V{};
        if (!loss.divergent && !loss.gradient) return;
        for (int64_t c = 0; c < loss.classes; c += W) {
            const int classes = int(least<int64_t>(W, loss.classes - c));
            for (int r = 0; r < loss.rows; ++r) {
                s.z[r] = z_of(r) + c * W;
                s.e[r] = e_of(r) + c * W;
                if (r >= loss.exits) continue;
                s.one[r] = one_of(r) + c * W;
                s.out[r] = call.gradient[r] ? z_of(r) + c * W : nullptr;  // z has been read
            }
            loss.lane_student(s, classes * W);
            for (int k = 0; k < loss.exits; ++k)
                if (s.out[k]) write(k, first, count, c, classes);
        }
    }
    void write(int k, int64_t first, int count, int64_t c, int classes) const {
        const Real *const from = z_of(k) + c * W;
        S *const to = loss.gradient_of(k, first) + c;
        const int64_t stride = loss.classes;
        V v[W];
        UNROLL for (int i = 0; i < W; ++i) v[i] = i < classes ? load(from + i * W) : V{};
        transpose(v);
        if (classes == W)
            for (int lane = 0; lane < count; ++lane) store(to + lane * stride, v[lane]);
        else
            for (int lane = 0; lane < count; ++lane)
                store_partial(to + lane * stride, classes, v[lane]);
    }
    // The label's share is subtracted in Real, before rounding to the storage dtype.
    void subtract_labels(int64_t first, int count) const {
        if (!call.label) return;
        int lanes[W], counted = 0;
        int64_t labels[W];
        for (int lane = 0; lane < count; ++lane) {
            lanes[counted] = lane;
            labels[counted] = call.label[first + lane];
            counted += valid[lane] != 0;
        }
        for (int k = 0; k < loss.exits; ++k) {
            if (!call.gradient[k]) continue;
            const Real *const from = z_of(k);
            S *const to = loss.gradient_of(k, first);
            Real share[W];
            store(share, s.row[k].mass_scale);
            for (int i = 0; i < counted; ++i) {
                const Real left = from[labels[i] * W + lanes[i]] - share[lanes[i]];
                store_one(to + lanes[i] * loss.classes + labels[i], left);
            }
        }
    }

    unsigned record(int64_t first, int count, const V *ce) {
        if (loss.form == Form::kScalar) predictions(first, count);
        // A class masked with -inf makes running sums inf - inf.
        auto finite = valid != V{};
        for (int k = 0; k < loss.exits; ++k) finite &= s.value[k] - s.value[k] == V{};
        for (int k = 0; k < loss.exits; ++k) {
            const V weighted = exit_weight(k, first, count) * ce[k], d = loss.scale * s.value[k];
            if (loss.form == Form::kScalar) {
                sums[k].cross_entropy += wide(finite ? ce[k] : V{});
                sums[k].weighted_ce += wide(finite ? weighted : V{});
                sums[k].divergence += wide(finite ? d : V{});
            } else if (loss.form == Form::kRows) {
                put_rows(call.row_cross_entropy, k, first, count, weighted);
                put_rows(call.row_divergence, k, first, count, d);
            }
        }
        return lanes_of(I(valid != V{})) & ~lanes_of(I(finite));
    }
    void predictions(int64_t first, int count) const {
        for (int k = 0; k < loss.exits; ++k) {
            const V confidence = load(g.inverse_one + g.at(0, k));
            if (any(I(confidence != confidence))) {
                for (int lane = 0; lane < count; ++lane) loss.predictions(g, lane, first + lane);
                return;
            }
            put_rows(call.confidence, k, first, count, confidence);
            memcpy(call.prediction + k * call.rows + first, g.argmax + g.at(0, k),
                   size_t(count) * sizeof(int64_t));
        }
    }
};

}  // namespace MSDKERN_NAMESPACE

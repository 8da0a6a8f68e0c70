// SPDX-License-Identifier: Apache-2.0
// The loss family: one pass over the logits of a sample, exits' row set kept in cache.
#pragma once

#include "batch.h"
#include "general.h"
#include "weights.h"

namespace MSDKERN_NAMESPACE {

enum class Form { kScalar, kRows, kRowsBackward };

// Up to this size exponentials are kept between the sweeps, beyond it they are recomputed.
constexpr int64_t kRowSetBytes = 8 << 20;
// Sums run over at most this many classes before they are added up: fewer roundings in a row.
constexpr int64_t kBlock = 4096;
constexpr int64_t kPrefetched = 4096;  // the next row is fetched early up to this many classes
constexpr int64_t kWindow = 256;       // classes per step when they are recomputed or converted

template <class S>
struct Loss {
    typedef typename Kind<S>::Real Real;
    typedef VecOf<Real> V;
    static const int W = kLanes<Real>;

    const msdkern_loss &call;
    const Form form;
    const int exits, rows;
    const int64_t classes;
    Real ce_factor, row_factor, scale;  // r of the two parts, and s
    Real smoothing, inverse_t;
    double sum_of_weights;  // of class_weight, for label smoothing
    bool divergent, gradient, general, dense_target, stored;
    Powers power;
    int64_t stride, window;
    SweepFunction<Real> student;
    TwoSweeps<Real> careful, two_sweeps;  // pair by pair, and what this call uses

    Loss(const msdkern_loss &c, Form f, const Normalizers &batch)
        : call(c), form(f), exits(c.exits), rows(c.exits + c.teachers), classes(c.classes) {
        const double squared = c.temperature_squared ? c.temperature * c.temperature : 1;
        const double given = c.normalizer != 0 ? 1 / c.normalizer : 1;
        const bool mean = c.mean && c.normalizer == 0;
        ce_factor = Real(mean ? reciprocal(batch.cross_entropy) : given);
        row_factor = Real(mean ? reciprocal(batch.rows) : given);
        scale = Real(c.pair_scale * squared);
        smoothing = Real(c.label_smoothing / double(c.classes));
        gradient = false;
        for (int k = 0; k < exits; ++k) gradient |= c.gradient[k] != nullptr;
        divergent = c.pairs != MSDKERN_PAIRS_NONE || c.pair_divergence;
        const bool direct = c.divergence == MSDKERN_FORWARD_KL || c.divergence == MSDKERN_SOFT_CE;
        general = !direct || !c.detach_teacher || c.pair_divergence;
        dense_target = c.target || (c.label && c.label_smoothing != 0);
        power = divergent ? powers(c.temperature) : Powers::kOne;
        inverse_t = divergent ? Real(1 / c.temperature) : Real(1);
        stride = padded<Real>(classes);
        const int64_t kept = rows * stride * int64_t(sizeof(Real)) * arrays();
        stored = kept <= kRowSetBytes;
        window = least(stride, padded<Real>(stored && kDirect ? kBlock : kWindow));
        careful = two_sweeps = find_pair_sweeps<Real>(c.divergence);
        const bool named = c.pairs == MSDKERN_PAIRS_MUTUAL || c.pairs == MSDKERN_PAIRS_DEEPER;
        if (named && !c.pair_divergence && c.divergence != MSDKERN_JSD)
            two_sweeps = find_named_sweeps<Real>(c.divergence);
        student = !divergent ? cross_entropy_sweep<Real>
                             : find_student_sweep<Real>(
                                   c.pairs == MSDKERN_PAIRS_NONE ? MSDKERN_PAIRS_DENSE : c.pairs,
                                   c.divergence == MSDKERN_SOFT_CE, gradient);
        sum_of_weights = double(classes);
        if (c.class_weight) {
            sum_of_weights = 0;
            for (int64_t i = 0; i < classes; ++i) sum_of_weights += double(class_weight(i));
        }
    }

    int arrays() const { return power == Powers::kOne ? 2 : 3; }
    Real class_weight(int64_t c) const {
        return call.class_weight ? static_cast<const Real *>(call.class_weight)[c] : Real(1);
    }
    const S *row_of(int r, int64_t n) const {
        return static_cast<const S *>(call.logits[r]) + n * call.stride[r];
    }
    S *gradient_of(int k, int64_t n) const {
        return call.gradient[k] ? static_cast<S *>(call.gradient[k]) + n * classes : nullptr;
    }
    static Real *real(void *p) { return static_cast<Real *>(p); }
    static const Real *real(const void *p) { return static_cast<const Real *>(p); }

    // Scratch of one thread: exponentials [rows][arrays][kept], gradients [exits][window], the
    // target's mass [stride], W [exits][rows], D [exits][rows].
    int64_t kept_classes() const { return stored ? stride : window; }
    size_t scratch_bytes() const {
        const int64_t matrices = 2 * (exits * rows / 16 + 1) * 16;
        return sizeof(Real) *
               size_t(rows * arrays() * kept_classes() + exits * window + stride + matrices);
    }

    struct Scratch {
        Real *kept, *gradient, *mass, *weight, *matrix;
    };
    Scratch scratch(void *memory) const {
        Scratch s;
        s.kept = static_cast<Real *>(memory);
        s.gradient = s.kept + rows * arrays() * kept_classes();
        s.mass = s.gradient + exits * window;
        s.weight = s.mass + stride;
        s.matrix = s.weight + (exits * rows / 16 + 1) * 16;
        return s;
    }
    RowStore<Real> store_of(const Scratch &scratch, int r) const {
        Real *at = scratch.kept + r * arrays() * kept_classes();
        RowStore<Real> result = {at, at + kept_classes(), at + kept_classes()};
        if (arrays() == 3) result.one = at + 2 * kept_classes();
        return result;
    }

    // (1) u and its sum, for targets that put mass on many classes.
    Real target_mass(Real *mass, int64_t n) const {
        double total = 0;
        if (call.label) {
            for (int64_t c = 0; c < classes; ++c) mass[c] = smoothing * class_weight(c);
            const Real on_label = Real(1 - call.label_smoothing) * class_weight(call.label[n]);
            mass[call.label[n]] += on_label;
            total = double(smoothing) * sum_of_weights + double(on_label);
        } else {
            const Real *y = real(call.target) + n * classes;
            const Real keep = Real(1 - call.label_smoothing);
            for (int64_t c = 0; c < classes; ++c) {
                mass[c] = (y[c] * keep + smoothing) * class_weight(c);
                total += double(mass[c]);
            }
        }
        for (int64_t c = classes; c < stride; ++c) mass[c] = 0;
        return Real(total);
    }
    Real dense_cross_entropy(const S *row, const Real *mass, Real m, Real log_one) const {
        V total = V{};
        for_vectors(row, classes, m, [&](int64_t c, V z) __attribute__((always_inline)) {
            total += weigh(load(mass + c), log_one - (z - m));
        });
        return sum<Real>(total);
    }

    struct Softmaxes {
        Real maximum[MSDKERN_MAX_ROWS], log_one[MSDKERN_MAX_EXITS], inverse_one[MSDKERN_MAX_EXITS];
    };

    // Maxima, exponentials and their sums of all rows of sample n.
    void softmaxes(int64_t n, const Scratch &scratch, Sweep<Real> &s, Softmaxes &result) const {
        Real at_t[MSDKERN_MAX_ROWS];
        for (int r = 0; r < rows; ++r) {
            const S *row = row_of(r, n);
            const S *next =
                n + 1 < call.rows && classes <= kPrefetched ? row_of(r, n + 1) : nullptr;
            const Real m = result.maximum[r] = row_maximum(row, classes, next);
            const RowSums<Real> sums = exponentials_of(row, m, store_of(scratch, r));
            at_t[r] = sums.at_t;
            if (r < exits) {
                result.log_one[r] = sums.at_one;
                result.inverse_one[r] = 1 / sums.at_one;
            }
        }
        if (divergent) slacks(s, at_t);
        logarithms(result.log_one, exits);
    }

    RowSums<Real> exponentials_of(const S *row, Real m, RowStore<Real> out) const {
        RowSums<Real> total = {0, 0};
        for (int64_t begin = 0; begin < classes; begin += kBlock) {
            const int64_t count = least(kBlock, classes - begin);
            const RowSums<Real> sums =
                stored ? exponentials<true>(power, row + begin, count, m, inverse_t, out + begin)
                       : exponentials<false>(power, row + begin, count, m, inverse_t, out);
            total.at_t += sums.at_t;
            total.at_one += sums.at_one;
        }
        return total;
    }

    static const bool kDirect = sizeof(S) == sizeof(Real);  // gradients need no conversion

    // Runs a sweep over all classes, window by window, and stores gradients in their dtype.
    void run(SweepFunction<Real> sweep, int64_t n, const Scratch &scratch, Sweep<Real> &s,
             const Softmaxes &softmax, bool writes) const {
        for (int64_t begin = 0; begin < classes; begin += window) {
            const int64_t count = least(window, classes - begin);
            if (!stored) refill(n, begin, count, scratch, softmax);
            if (window < classes) aim(s, scratch, begin);
            for (int k = 0; k < exits; ++k) {
                s.out[k] = nullptr;
                if (!writes || !call.gradient[k]) continue;
                s.out[k] =
                    kDirect ? direct(gradient_of(k, n)) + begin : scratch.gradient + k * window;
            }
            sweep(s, count);
            if (writes && !kDirect) flush(n, begin, count, s);
        }
    }
    void refill(int64_t n, int64_t begin, int64_t count, const Scratch &scratch,
                const Softmaxes &softmax) const {
        for (int r = 0; r < rows; ++r)
            exponentials<true>(power, row_of(r, n) + begin, count, softmax.maximum[r], inverse_t,
                               store_of(scratch, r));
    }
    // Points the sweep at the classes from `begin` on.
    void aim(Sweep<Real> &s, const Scratch &scratch, int64_t begin) const {
        const int64_t at = stored ? begin : 0;
        for (int r = 0; r < rows; ++r) {
            const RowStore<Real> kept = store_of(scratch, r);
            s.x[r] = kept.x + at;
            s.e[r] = kept.e + at;
            if (r < exits) s.one[r] = kept.one + at;
        }
        s.mass = dense_target ? scratch.mass + begin : nullptr;
    }
    static Real *direct(Real *p) { return p; }
    template <class Other>
    static Real *direct(Other *) {
        return nullptr;  // another dtype is never written directly
    }
    // The label's share is subtracted in Real, before rounding to the storage dtype.
    void flush(int64_t n, int64_t begin, int64_t count, Sweep<Real> &s) const {
        const int64_t label = call.label && !dense_target ? call.label[n] - begin : -1;
        for (int k = 0; k < exits; ++k) {
            if (!s.out[k]) continue;
            S *to = gradient_of(k, n) + begin;
            if (label >= 0 && label < count) s.out[k][label] -= s.mass_scale[k];
            int64_t c = 0;
            for (; c + W <= count; c += W) store(to + c, load(s.out[k] + c));
            if (c < count) store_partial(to + c, int(count - c), load(s.out[k] + c));
        }
    }
    void subtract_label(int64_t n, const Sweep<Real> &s) const {
        if (!kDirect || !call.label || dense_target) return;
        for (int k = 0; k < exits; ++k)
            if (call.gradient[k]) direct(gradient_of(k, n))[call.label[n]] -= s.mass_scale[k];
    }

    void zero_row(int64_t n) const {
        for (int k = 0; k < exits; ++k)
            if (call.gradient[k]) memset(gradient_of(k, n), 0, size_t(classes) * sizeof(S));
    }

    // (1)-(7) for sample n.
    void row(int64_t n, const Scratch &scratch, Sweep<Real> &s, Partial *partial) const {
        const bool ignore = call.label && call.label[n] == call.ignore_index;
        if (ignore && form != Form::kScalar) return ignored(n);
        Softmaxes softmax;
        softmaxes(n, scratch, s, softmax);
        if (form == Form::kScalar) predictions(n, softmax);
        if (ignore) return ignored(n);
        Real ce[MSDKERN_MAX_EXITS];
        cross_entropies(n, scratch, s, softmax, ce);
        if (call.pairs == MSDKERN_PAIRS_DENSE) dense_weights(call, s, scratch.weight, n);
        divergences_and_gradients(n, scratch, s, softmax);
        if (partial) {
            for (int k = 0; k < exits; ++k) {
                partial->cross_entropy[k] += double(ce[k]);
                partial->weighted_ce[k] += double(exit_weight(k, n) * ce[k]);
                partial->divergence[k] += double(scale * s.value[k]);
            }
            if (s.matrix)
                for (int i = 0; i < exits * rows; ++i) partial->matrix[i] += double(s.matrix[i]);
        }
        if (form == Form::kRows)
            for (int k = 0; k < exits; ++k) {
                real(call.row_cross_entropy)[k * call.rows + n] = exit_weight(k, n) * ce[k];
                real(call.row_divergence)[k * call.rows + n] = scale * s.value[k];
            }
    }
    void predictions(int64_t n, const Softmaxes &softmax) const {
        for (int k = 0; k < exits; ++k) {
            const Real confidence = softmax.inverse_one[k];
            real(call.confidence)[k * call.rows + n] = confidence;
            call.prediction[k * call.rows + n] =
                row_argmax(row_of(k, n), classes, softmax.maximum[k], confidence != confidence);
        }
    }
    void ignored(int64_t n) const {
        zero_row(n);
        if (form != Form::kRows) return;
        for (int k = 0; k < exits; ++k)
            real(call.row_cross_entropy)[k * call.rows + n] =
                real(call.row_divergence)[k * call.rows + n] = 0;
    }
    Real exit_weight(int k, int64_t n) const {
        if (!call.exit_weight) return 1;
        return real(call.exit_weight)[call.exit_weight_per_row ? k * call.rows + n : k];
    }
    // CE_k[n] and the scales of its gradient.
    void cross_entropies(int64_t n, const Scratch &scratch, Sweep<Real> &s,
                         const Softmaxes &softmax, Real *ce) const {
        const bool labelled = call.label || call.target;
        Real mass = 0;
        if (dense_target)
            mass = target_mass(scratch.mass, n);
        else if (call.label)
            mass = class_weight(call.label[n]);
        for (int k = 0; k < exits; ++k) {
            const S *row = row_of(k, n);
            const Real m = softmax.maximum[k], log_one = softmax.log_one[k];
            ce[k] = 0;
            if (dense_target) {
                ce[k] = dense_cross_entropy(row, scratch.mass, m, log_one);
            } else if (call.label) {
                const Real z = load_partial(row + call.label[n], 1, Real(0))[0];
                ce[k] = mass * (log_one - (z - m));
            }
            Real upstream = ce_factor;
            if (form == Form::kRowsBackward)
                upstream = real(call.upstream_cross_entropy)[k * call.rows + n];
            const Real a = labelled ? upstream * exit_weight(k, n) : Real(0);
            s.p_scale[k] = a * mass * softmax.inverse_one[k];
            s.mass_scale[k] = dense_target ? a : a * mass;
        }
    }
    void divergences_and_gradients(int64_t n, const Scratch &scratch, Sweep<Real> &s,
                                   const Softmaxes &softmax) const {
        for (int k = 0; k < exits; ++k) {
            Real upstream = row_factor;
            if (form == Form::kRowsBackward)
                upstream = real(call.upstream_divergence)[k * call.rows + n];
            s.pair_scale[k] = upstream * scale * (general ? Real(1) : s.share[k] * inverse_t);
        }
        clear(s);
        if (!divergent && !gradient) return;
        if (divergent && general) {
            run_general(two_sweeps, n, scratch, s, softmax);
            // A class masked with -inf makes running sums inf - inf; the pairs are careful.
            if (two_sweeps.values != careful.values && not_finite(s))
                run_general(careful, n, scratch, s, softmax);
        } else {
            run(student, n, scratch, s, softmax, gradient);
            if (divergent && not_finite(s)) {
                clear(s);
                run(careful.values, n, scratch, s, softmax, false);
            }
        }
        if (divergent) correct_values(s, call.divergence);
        if (gradient) subtract_label(n, s);
    }
    void run_general(const TwoSweeps<Real> &sweeps, int64_t n, const Scratch &scratch,
                     Sweep<Real> &s, const Softmaxes &softmax) const {
        clear(s);
        run(sweeps.values, n, scratch, s, softmax, false);
        if (gradient) run(sweeps.gradients, n, scratch, s, softmax, true);
    }
    void clear(Sweep<Real> &s) const {
        for (int k = 0; k < exits; ++k) s.value[k] = s.total[k] = 0;
        if (s.matrix) memset(s.matrix, 0, size_t(exits * rows) * sizeof(Real));
    }
    bool not_finite(const Sweep<Real> &s) const {
        for (int k = 0; k < exits; ++k)
            if (!(s.value[k] - s.value[k] == 0 && s.total[k] - s.total[k] == 0)) return true;
        return false;
    }

    void block(int64_t first, int64_t last, Partial *partial) const {
        void *memory = arena().take(scratch_bytes());
        if (!memory) {
            __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
            return;
        }
        const Scratch s = scratch(memory);
        Sweep<Real> sweep;
        sweep.exits = exits;
        sweep.rows = rows;
        sweep.pairs = call.pairs;
        sweep.inverse_temperature = inverse_t;
        sweep.weight = s.weight;
        sweep.matrix = call.pair_divergence ? s.matrix : nullptr;
        sweep.detach = call.detach_teacher != 0;
        sweep.beta = Real(call.beta);
        pair_weights(call, sweep, s.weight);
        aim(sweep, s, 0);
        for (int64_t n = first; n < last; ++n) row(n, s, sweep, partial);
        arena().trim();
    }
    mutable int failed = 0;
};

template <class S>
static int run_loss(msdkern_loss &call, Form form) {
    typedef typename Kind<S>::Real Real;
    Normalizers batch;
    if (const int status = count_rows<Real>(call, batch)) return status;
    const Loss<S> loss(call, form, batch);
    const Blocks blocks(call.rows, loss.rows * call.classes);
    const bool scalar = form == Form::kScalar;
    const int64_t fields = Partial::fields(call);
    const size_t bytes = size_t(most<int64_t>(1, blocks.count) * fields) * sizeof(double);
    double *sums = scalar ? static_cast<double *>(calloc(1, bytes)) : nullptr;
    if (scalar && !sums) return MSDKERN_NO_MEMORY;
    parallel_for(blocks.count, call.place.threads, [&](int64_t b) {
        if (!scalar) return loss.block(blocks.first(b), blocks.last(b), nullptr);
        Partial partial(sums + b * fields, call);
        loss.block(blocks.first(b), blocks.last(b), &partial);
    });
    if (scalar) finish<Real>(call, batch, sums, blocks.count);
    free(sums);
    return loss.failed ? MSDKERN_NO_MEMORY : MSDKERN_OK;
}

}  // namespace MSDKERN_NAMESPACE

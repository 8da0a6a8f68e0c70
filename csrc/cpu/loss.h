// SPDX-License-Identifier: Apache-2.0
// The loss family: one pass over the logits of a sample, exits' row set kept in cache.
#pragma once

#include "batch.h"
#include "columns.h"
#include "general.h"
#include "group.h"
#include "in_place.h"
#include "scratch.h"
#include "targets.h"
#include "ways.h"
#include "weights.h"

namespace MSDKERN_NAMESPACE {

template <class S>
struct Loss {
    typedef typename Kind<S>::Real Real;
    typedef VecOf<Real> V;
    static const int W = kLanes<Real>;

    const msdkern_loss &call;
    const Form form;
    const Targets<S> targets;
    const int exits, rows;
    const int64_t classes;
    Real row_factor, scale, inverse_t;  // r of the divergences, and s
    Rate<Real> rate;
    bool divergent, gradient, general, stored, streams;  // stored: exponentials
    Powers power;
    Way way;
    int64_t stride, window, samples;        // samples: worked on together
    SweepFunction<Real> student, labelled;  // labelled: with mass on some classes
    SweepFunction<Real, V> lane_student;    // over columns
    TwoSweeps<Real> careful, two_sweeps;    // pair by pair, and what this call uses

    Loss(const msdkern_loss &c, Form f, const Normalizers &batch)
        : call(c),
          form(f),
          targets(c, f, batch),
          exits(c.exits),
          rows(c.exits + c.teachers),
          classes(c.classes),
          rate(c.temperature) {
        const double squared = c.temperature_squared ? c.temperature * c.temperature : 1;
        row_factor = Real(batch.r(c, batch.rows));
        scale = Real(c.pair_scale * squared);
        gradient = false;
        for (int k = 0; k < exits; ++k) gradient |= c.gradient[k] != nullptr;
        divergent = c.pairs != MSDKERN_PAIRS_NONE || c.pair_divergence;
        const bool direct = c.divergence == MSDKERN_FORWARD_KL || c.divergence == MSDKERN_SOFT_CE;
        general = !direct || !c.detach_teacher || c.pair_divergence;
        power = divergent ? powers(c.temperature) : Powers::kOne;
        if (!divergent) rate = Rate<Real>();
        inverse_t = divergent ? Real(1 / c.temperature) : Real(1);
        stride = padded<Real>(classes);
        const bool swept = !(divergent && general);  // in one sweep
        way = swept && !targets.dense && !c.pair_weight_per_row ? way_of() : Way::kRows;
        streams = gradient && swept && way == Way::kRows && streamable();
        const int64_t kept = rows * stride * int64_t(sizeof(Real)) * arrays();
        stored = kept <= (streams ? kKeptStreaming : swept ? kKeptForOne : kKeptForTwo);
        samples = most<int64_t>(1, stored ? least(kMostSamples, kGroupBytes / kept) : 1);
        if (way != Way::kRows) samples = 1;  // those that must go row by row
        window = least(stride, padded<Real>(kBlock));
        choose_sweeps();
    }

    void choose_sweeps() {
        careful = two_sweeps = find_pair_sweeps<S>(call.divergence);
        const bool named = call.pairs == MSDKERN_PAIRS_MUTUAL || call.pairs == MSDKERN_PAIRS_DEEPER;
        if (named && !call.pair_divergence && call.divergence != MSDKERN_JSD)
            two_sweeps = find_named_sweeps<S>(call.divergence);
        bool plain = !streams && !targets.dense;
        for (int k = 0; k < exits; ++k) plain &= call.gradient[k] != nullptr;
        const Writes writes = plain ? Writes::kPlain : gradient ? Writes::kAny : Writes::kNone;
        student = find_sweep<S, Real>(call, writes);
        labelled = find_sweep<S, Real>(call, Writes::kAny);
        lane_student = way == Way::kColumns ? find_sweep<Real, V>(call, writes) : nullptr;
    }

    Way way_of() const {
        const int64_t bytes = rows * int64_t(sizeof(Real));  // per class
        if (classes <= (gradient ? kColumnsWritten : kColumnsRead) &&
            bytes * classes * W <= kColumnBytes)
            return Way::kColumns;
        return bytes * arrays() * stride <= kInPlaceBytes ? Way::kInPlace : Way::kRows;
    }
    // Whole vectors at their places, and more of them than fit a cache.
    bool streamable() const {
        bool whole = classes % W == 0;
        for (int k = 0; k < exits; ++k)
            whole &= reinterpret_cast<uintptr_t>(call.gradient[k]) % (W * sizeof(S)) == 0;
        return whole && exits * call.rows * classes * int64_t(sizeof(S)) > kCacheBytes;
    }
    int arrays() const { return power == Powers::kNone ? 2 : 1; }
    const S *row_of(int r, int64_t n) const {
        return static_cast<const S *>(call.logits[r]) + n * call.stride[r];
    }
    S *gradient_of(int k, int64_t n) const {
        return call.gradient[k] ? static_cast<S *>(call.gradient[k]) + n * classes : nullptr;
    }
    static Real *real(void *p) { return static_cast<Real *>(p); }
    static const Real *real(const void *p) { return static_cast<const Real *>(p); }

    ScratchSizes sizes() const {
        return {samples,
                exits,
                rows,
                arrays(),
                stored ? stride : window,
                divergent ? window : 0,
                targets.dense ? stride : W};
    }

    // Maxima, exponentials and their sums of the rows of `count` samples, and their logarithms.
    void softmaxes(int64_t first, int count, const Scratch<Real> &scratch) const {
        const Group<Real> &g = scratch.group;
        const bool few = stored && classes < kFewVectors * W;
        if (few) tops(first, count * rows, g);
        with_power(power, [&](auto p) __attribute__((always_inline)) {
            constexpr Powers P = decltype(p)::value;
            for (int at = 0, i = 0; i < count; ++i)
                for (int r = 0; r < rows; ++r, ++at) {
                    const S *row = row_of(r, first + i);
                    const RowStore<Real> out = scratch.store_of(i, r);
                    Top<Real> top = {g.maximum[at], g.argmax[at]};
                    RowSums<V> sums;
                    if (few) {
                        sums = exponentials<P, true>(row, classes, top.maximum, rate, out);
                    } else if (stored) {
                        top = row_top(row, classes);
                        sums = strips<P, true>(row, classes, top.maximum, rate, out,
                                               row_at(first, at + 1));
                    } else {
                        sums = read_once<P>(row, classes, rate, top);
                    }
                    g.maximum[at] = top.maximum;
                    g.argmax[at] = top.argmax;
                    scratch.fold_t[at] = sums.at_t;
                    scratch.fold_one[at] = sums.at_one;
                }
        });
        fold_rows(scratch.fold_t, count * rows, Add(), g.sum_t);
        fold_rows(scratch.fold_one, count * rows, Add(), g.sum_one);
        if (divergent) normalize_at_t(g, count, rows, exits);
        normalize_at_one(g, count * rows);
    }
    // The i-th row from sample `first` on, exits and teachers of a sample one after another; the
    // last sample's again where there is no further one.
    const S *row_at(int64_t first, int i) const {
        return row_of(i % rows, least(first + i / rows, call.rows - 1));
    }
    void tops(int64_t first, int all, const Group<Real> &g) const {
        for (int i = 0; i < all; i += W)
            short_row_tops<S>(
                least(W, all - i), classes, [&](int j) { return row_at(first, i + j); },
                g.maximum + i, g.argmax + i);
    }

    // Sample n, the `index`th of its group, whose rows begin at `first` in the group's arrays.
    struct Sample {
        int64_t n;
        int index, first;
        bool copied;  // the sweeps read whole vectors of logits, in Real
        const Scratch<Real> &scratch;
        Sweep<Real> &s;
    };

    // Runs a sweep over all classes, window by window.
    void run(SweepFunction<Real> sweep, const Sample &x, bool writes) const {
        x.s.mass = nullptr;
        // From the last window back: its exponentials are the likeliest to be in a cache still.
        for (int64_t begin = (classes - 1) / window * window; begin >= 0; begin -= window) {
            if (targets.dense) x.s.mass = x.scratch.mass + begin;
            run(sweep, x, begin, least(window, classes - begin), writes);
        }
    }
    void run(SweepFunction<Real> sweep, const Sample &x, int64_t begin, int64_t count,
             bool writes) const {
        Sweep<Real> &s = x.s;
        if (!stored) refill(x, begin, count);
        if (x.copied) copy_logits(x, begin, count);
        aim(x, begin);
        for (int k = 0; k < exits; ++k)
            s.out[k] = writes && call.gradient[k] ? gradient_of(k, x.n) + begin : nullptr;
        sweep(s, count);
    }
    void refill(const Sample &x, int64_t begin, int64_t count) const {
        with_power(power, [&](auto p) __attribute__((always_inline)) {
            for (int r = 0; r < rows; ++r)
                strips<decltype(p)::value, true>(row_of(r, x.n) + begin, count,
                                                 x.scratch.group.maximum[x.first + r], rate,
                                                 x.scratch.store_of(x.index, r),
                                                 row_of(r, x.n) + most<int64_t>(0, begin - window));
        });
    }
    void copy_logits(const Sample &x, int64_t begin, int64_t count) const {
        for (int r = 0; r < rows; ++r)
            for_vectors(row_of(r, x.n) + begin, count, Real(0),
                        [&](int64_t c, V z) __attribute__((always_inline)) {
                            store(x.scratch.logits + r * window + c, z);
                        });
    }
    // Points the sweep at the classes from `begin` on.
    void aim(const Sample &x, int64_t begin) const {
        Sweep<Real> &s = x.s;
        const int64_t at = stored ? begin : 0;
        for (int r = 0; r < rows; ++r) {
            const RowStore<Real> kept = x.scratch.store_of(x.index, r);
            s.z[r] = x.copied ? static_cast<const void *>(x.scratch.logits + r * window)
                              : row_of(r, x.n) + begin;
            s.e[r] = kept.e + at;
            if (r < exits) s.one[r] = kept.one + at;  // e itself where powers of it serve
        }
    }
    // The label's share of sample n, where gradients are stored in Real.
    void subtract_in_row(int64_t n, const RowConstants<Real> *row) const {
        for (int k = 0; k < exits; ++k)
            if (call.gradient[k])
                real(call.gradient[k])[n * classes + call.label[n]] -= row[k].mass_scale;
    }
    // The label's share is subtracted in Real, before rounding to the storage dtype: where that
    // rounds, by the sweep once more, over the vector of classes that has the label.
    void subtract_label(SweepFunction<Real> sweep, const Sample &x) const {
        if (!call.label || targets.dense) return;
        const int64_t label = call.label[x.n], begin = label / W * W;
        if (sizeof(S) == sizeof(Real)) return subtract_in_row(x.n, x.s.row);
        store(x.scratch.mass, V{});
        x.scratch.mass[label - begin] = 1;
        x.s.mass = x.scratch.mass;
        run(sweep, x, begin, least<int64_t>(W, classes - begin), true);
    }

    void zero_row(int64_t n) const {
        for (int k = 0; k < exits; ++k)
            if (call.gradient[k]) memset(gradient_of(k, n), 0, size_t(classes) * sizeof(S));
    }
    // (1)-(7) for samples first to last, `samples` of them at most.
    void group(int64_t first, int64_t last, const Scratch<Real> &scratch, Sweep<Real> &s,
               Partial *partial) const {
        const int count = int(last - first);
        softmaxes(first, count, scratch);
        const bool copied = divergent && general;
        for (int i = 0; i < count; ++i) {
            const Sample x = {first + i, i, scratch.group.at(i, 0), copied, scratch, s};
            if (form == Form::kScalar) predictions(scratch.group, i, x.n);
            if (targets.ignored(x.n))
                leave_out(x.n);
            else
                sample(x, partial);
        }
    }
    void sample(const Sample &x, Partial *partial) const {
        Sweep<Real> &s = x.s;
        const Group<Real> &g = x.scratch.group;
        take_rows(g, x.first, 1, s);
        Real ce[MSDKERN_MAX_EXITS];
        Real *const u = x.scratch.mass;
        const Real total = targets.mass(x.n, u, stride);
        for (int k = 0; k < exits; ++k) {
            const auto c = targets.cross_entropy(g, x.first + k, k, x.n, total, u);
            ce[k] = c.value;
            s.row[k].p_scale = c.p_scale;
            s.row[k].mass_scale = c.mass_scale;
        }
        if (call.pairs == MSDKERN_PAIRS_DENSE && call.pair_weight_per_row)
            dense_weights(call, s, x.scratch.weight, x.n);
        const SweepFunction<Real> writer = divergences_and_gradients(x);
        record(x.n, ce, s.value, partial);
        if (partial && s.matrix)
            for (int i = 0; i < exits * rows; ++i) partial->matrix[i] += double(s.matrix[i]);
        if (gradient) subtract_label(writer, x);
    }
    // What sample n adds to the batch, or its rows of the outputs.
    void record(int64_t n, const Real *ce, const Real *divergence, Partial *partial) const {
        for (int k = 0; k < exits; ++k) {
            const Real weighted = targets.exit_weight(k, n) * ce[k], d = scale * divergence[k];
            if (partial) {
                partial->cross_entropy[k] += double(ce[k]);
                partial->weighted_ce[k] += double(weighted);
                partial->divergence[k] += double(d);
            } else if (form == Form::kRows) {
                real(call.row_cross_entropy)[k * call.rows + n] = weighted;
                real(call.row_divergence)[k * call.rows + n] = d;
            }
        }
    }
    void predictions(const Group<Real> &g, int index, int64_t n) const {
        for (int k = 0; k < exits; ++k) {
            const Real confidence = g.inverse_one[g.at(index, k)];
            real(call.confidence)[k * call.rows + n] = confidence;
            const int64_t argmax = g.argmax[g.at(index, k)];
            call.prediction[k * call.rows + n] =
                confidence == confidence ? argmax : first_nan(row_of(k, n), classes, argmax);
        }
    }
    void leave_out(int64_t n) const {
        zero_row(n);
        if (form != Form::kRows) return;
        for (int k = 0; k < exits; ++k)
            real(call.row_cross_entropy)[k * call.rows + n] =
                real(call.row_divergence)[k * call.rows + n] = 0;
    }
    // s r of the divergence of student k.
    Real divergence_scale(int k, int64_t n) const {
        const Real upstream = form == Form::kRowsBackward
                                  ? real(call.upstream_divergence)[k * call.rows + n]
                                  : row_factor;
        return upstream * scale;
    }
    // Returns what the gradients were written by.
    SweepFunction<Real> divergences_and_gradients(const Sample &x) const {
        Sweep<Real> &s = x.s;
        for (int k = 0; k < exits; ++k)
            s.row[k].pair_scale =
                divergence_scale(k, x.n) * (general ? Real(1) : s.share[k] * inverse_t);
        clear(s);
        SweepFunction<Real> written = labelled;
        if (!divergent && !gradient) return written;
        if (divergent && general) {
            run_general(two_sweeps, x);
            written = two_sweeps.gradients;
            // A class masked with -inf makes running sums inf - inf; the pairs are careful.
            if (two_sweeps.values != careful.values && not_finite(s)) {
                run_general(careful, x);
                written = careful.gradients;
            }
        } else {
            run(student, x, gradient);
            if (divergent && not_finite(s)) {
                clear(s);
                run(careful.values, {x.n, x.index, x.first, true, x.scratch, s}, false);
            }
        }
        if (divergent) correct_values(s, call.divergence);
        return written;
    }
    void run_general(const TwoSweeps<Real> &sweeps, const Sample &x) const {
        clear(x.s);
        run(sweeps.values, x, false);
        if (gradient) run(sweeps.gradients, x, true);
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

    template <template <class, class> class Layout>
    void by_lanes(int64_t first, int64_t last, void *memory, const Scratch<Real> &scratch,
                  Sweep<Real> &s, Partial *partial) const {
        Lanes<S, Loss, Layout> lanes(*this, memory, scratch.weight);
        for (int64_t n = first; n < last; n += W) {
            unsigned left = lanes.group(n, least(last, n + W), last);
            for (; left; left &= left - 1) {
                const int64_t row = n + __builtin_ctz(left);
                group(row, row + 1, scratch, s, partial);
            }
        }
        if (partial) lanes.add_to(*partial);
    }
    // What a sweep has of the call; all that pair weights say but for those of each row.
    template <class Num>
    void prepare(Sweep<Real, Num> &s, Real *weight) const {
        s.exits = exits;
        s.rows = rows;
        s.pairs = call.pairs;
        s.mass = nullptr;
        s.streams = streams;
        s.inverse_temperature = inverse_t;
        s.weight = weight;
        s.values = nullptr;
        s.matrix = nullptr;
        s.detach = call.detach_teacher != 0;
        s.beta = Real(call.beta);
        pair_weights(call, s, weight);
        if (call.pairs == MSDKERN_PAIRS_DENSE) dense_weights(call, s, weight, 0);
    }
    size_t lane_bytes() const {
        return way == Way::kColumns   ? Lanes<S, Loss, Columns>::bytes(*this)
               : way == Way::kInPlace ? Lanes<S, Loss, InPlace>::bytes(*this)
                                      : 0;
    }
    void block(int64_t first, int64_t last, Partial *partial) const {
        const ScratchSizes own = sizes();
        const size_t mine = (Scratch<Real>::bytes(own) + 63) / 64 * 64;
        void *memory = arena().take(mine + lane_bytes());
        if (!memory) {
            __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
            return;
        }
        const Scratch<Real> s(memory, own);
        OwnSweep<Real> sweep(power, rate);
        prepare(sweep, s.weight);
        if (call.pair_divergence) sweep.matrix = s.matrix;
        void *const rest = static_cast<char *>(memory) + mine;
        if (way == Way::kColumns)
            by_lanes<Columns>(first, last, rest, s, sweep, partial);
        else if (way == Way::kInPlace)
            by_lanes<InPlace>(first, last, rest, s, sweep, partial);
        else
            for (int64_t n = first; n < last; n += samples)
                group(n, least(last, n + samples), s, sweep, partial);
        if (streams) end_streams();
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

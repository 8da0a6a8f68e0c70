// SPDX-License-Identifier: Apache-2.0
// What is known of each row of logits once its exponentials are summed. A few samples are worked on
// at a time, so that logarithms and divisions serve whole vectors of rows.
#pragma once

#include "sweeps.h"

namespace MSDKERN_NAMESPACE {

// Arrays with an entry per sample and row, rows being exits and external teachers.
template <class Real>
struct Group {
    int sample_step, row_step;  // from entry to entry
    Real *maximum;
    Real *sum_t, *sum_one;                  // of the exponentials at T and at 1
    Real *log_t, *inverse_t, *gap, *slack;  // log and 1 / of sum_t; see below
    Real *log_one, *inverse_one;            // of sum_one; inverse_one is the confidence
    double *logs;
    int64_t *argmax;

    int at(int sample, int row) const { return sample * sample_step + row * row_step; }
    static const int kArrays = 9;
    static size_t bytes(int64_t entries) {
        return size_t(entries) * (kArrays * sizeof(Real) + sizeof(double) + sizeof(int64_t));
    }
    // Lays the arrays out in `memory`, of bytes(entries) bytes and aligned for double.
    Group(void *memory, int64_t entries, int sample_step_, int row_step_)
        : sample_step(sample_step_), row_step(row_step_) {
        logs = static_cast<double *>(memory);
        argmax = reinterpret_cast<int64_t *>(logs + entries);
        Real *at = reinterpret_cast<Real *>(argmax + entries);
        Real **const arrays[kArrays] = {&maximum, &sum_t, &sum_one, &log_t,      &inverse_t,
                                        &gap,     &slack, &log_one, &inverse_one};
        for (Real **array : arrays) {
            *array = at;
            at += entries;
        }
    }
};

// The normaliser S of a row enters as log S, rounded, and as 1 / S, rounded: then log q and q do
// not quite belong together, and a KL of near-identical exits, which is of second order, inherits
// an error of first order. That error is a constant per row, known here: rounding adds
// slack[j] - slack[i] to sum_c q_j (l_j - l_i) + (q_i - q_j). gap is log S less the deepest exit's.
template <class Real>
static void normalize_at_t(const Group<Real> &g, int samples, int rows, int exits) {
    const int entries = samples * rows;  // one after another, in whichever order
    for (int i = 0; i < entries; ++i) g.logs[i] = double(g.sum_t[i]);
    logarithms(g.logs, entries);
    for (int i = 0; i < entries; ++i) g.inverse_t[i] = 1 / g.sum_t[i];
    for (int i = 0; i < entries; ++i) g.log_t[i] = Real(g.logs[i]);
    for (int n = 0; n < samples; ++n) {
        // Any reference that all rows of a sample share will do; exits may hold NaN.
        const double last = g.logs[g.at(n, exits - 1)], deepest = last - last == 0 ? last : 0;
        for (int r = 0; r < rows; ++r) {
            const int i = g.at(n, r);
            const double gap = g.logs[i] - deepest;
            const double excess = double(g.inverse_t[i]) * double(g.sum_t[i]) - 1;
            g.gap[i] = Real(gap);
            g.slack[i] = Real((gap - double(g.gap[i])) - excess);
        }
    }
}

template <class Real>
static void normalize_at_one(const Group<Real> &g, int entries) {
    for (int i = 0; i < entries; ++i) {
        g.log_one[i] = g.sum_one[i];
        g.inverse_one[i] = 1 / g.sum_one[i];
    }
    logarithms(g.log_one, entries);
}

// The entries of one sample, or vectors of them: what a Sweep has of each row.
template <class Real, class Num>
INLINE void take_rows(const Group<Real> &g, int first, int step, Sweep<Real, Num> &s) {
    for (int r = 0; r < s.rows; ++r) {
        const int i = first + r * step;
        s.row[r].maximum = *reinterpret_cast<const Num *>(g.maximum + i);
        s.row[r].log_t = *reinterpret_cast<const Num *>(g.log_t + i);
        s.row[r].inverse_t = *reinterpret_cast<const Num *>(g.inverse_t + i);
        s.row[r].gap = *reinterpret_cast<const Num *>(g.gap + i);
        s.row[r].slack = *reinterpret_cast<const Num *>(g.slack + i);
    }
}

}  // namespace MSDKERN_NAMESPACE

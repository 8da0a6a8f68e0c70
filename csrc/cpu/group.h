// SPDX-License-Identifier: Apache-2.0
// What is known of each row of logits once its exponentials are summed. A few samples are worked on
// at a time, so that logarithms and divisions serve whole vectors of rows.
#pragma once

#include "rows.h"

namespace MSDKERN_NAMESPACE {

// Arrays [samples][rows], rows being exits and external teachers.
template <class Real>
struct Group {
    Real *maximum;
    Real *sum_t, *sum_one;                  // of the exponentials at T and at 1
    Real *log_t, *inverse_t, *gap, *slack;  // log and 1 / of sum_t; see below
    Real *log_one, *inverse_one;            // of sum_one; inverse_one is the confidence
    double *logs;
    int64_t *argmax;

    static const int kArrays = 9;
    static size_t bytes(int64_t entries) {
        return size_t(entries) * (kArrays * sizeof(Real) + sizeof(double) + sizeof(int64_t));
    }
    // Lays the arrays out in `memory`, of bytes(entries) bytes and aligned for double.
    Group(void *memory, int64_t entries) {
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
    const int entries = samples * rows;
    for (int i = 0; i < entries; ++i) g.logs[i] = double(g.sum_t[i]);
    logarithms(g.logs, entries);
    for (int i = 0; i < entries; ++i) g.inverse_t[i] = 1 / g.sum_t[i];
    for (int i = 0; i < entries; ++i) g.log_t[i] = Real(g.logs[i]);
    for (int first = 0; first < entries; first += rows) {
        const double deepest = g.logs[first + exits - 1];
        for (int i = first; i < first + rows; ++i) {
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

}  // namespace MSDKERN_NAMESPACE

// SPDX-License-Identifier: Apache-2.0
// (3) Pair weights. Student i's divergence is share[i] sum_j w_ij D_ij with sum_j w_ij = n[i].
#pragma once

#include "sweeps.h"

namespace MSDKERN_NAMESPACE {

// W[i][j] of a named weight.
template <class Real>
static Real named_weight(int pairs, int exits, int i, int j) {
    if (j >= exits || (j <= i && pairs != MSDKERN_PAIRS_MUTUAL) || j == i) return 0;
    switch (pairs) {
        case MSDKERN_PAIRS_MUTUAL:
            return 1 / Real(exits - 1);
        case MSDKERN_PAIRS_DEEPER:
            return 1 / Real(exits - 1 - i);
        case MSDKERN_PAIRS_LAST:
            return j == exits - 1;
        case MSDKERN_PAIRS_NEXT:
            return j == i + 1;
        default:
            return 0;
    }
}

// Named weights: `matrix` gets W, share included. Mutual sums count the student's own share, which
// adds nothing to a divergence, so that one sum serves all students.
template <class Real, class Num>
static void pair_weights(const msdkern_loss &call, Sweep<Real, Num> &s, Real *matrix) {
    for (int i = 0; i < s.exits; ++i) {
        Real total = 0, largest = 0;
        for (int j = 0; j < s.rows; ++j) {
            const Real w = named_weight<Real>(call.pairs, s.exits, i, j);
            matrix[i * s.rows + j] = w;
            total += w != 0;
            largest = most(largest, w);
        }
        s.share[i] = largest;
        s.n[i] = total + Real(call.pairs == MSDKERN_PAIRS_MUTUAL);
    }
}

// Sample n's matrix of arbitrary weights.
template <class Real, class Num>
static void dense_weights(const msdkern_loss &call, Sweep<Real, Num> &s, Real *matrix, int64_t n) {
    const Real *given = static_cast<const Real *>(call.pair_weight);
    for (int i = 0; i < s.exits; ++i) {
        s.share[i] = 1;
        s.n[i] = 0;
        for (int j = 0; j < s.rows; ++j) {
            const int64_t at = i * s.rows + j;
            matrix[at] = call.pair_weight_per_row ? given[at * call.rows + n] : given[at];
            s.n[i] += matrix[at];
        }
    }
}

}  // namespace MSDKERN_NAMESPACE

// SPDX-License-Identifier: Apache-2.0
// What concerns the whole batch of a loss: labels, normalisers and sums over rows.
#pragma once

#include "../msdkern.h"
#include "rows.h"

namespace MSDKERN_NAMESPACE {

// What a block of rows adds up, in double: per exit, and the matrix of pairs where it is wanted.
struct Partial {
    double *cross_entropy, *weighted_ce, *divergence, *matrix;
    static int64_t fields(const msdkern_loss &call) {
        const int64_t pairs = call.pair_divergence ? call.exits + call.teachers : 0;
        return call.exits * (3 + pairs);
    }
    Partial(double *at, const msdkern_loss &call)
        : cross_entropy(at),
          weighted_ce(at + call.exits),
          divergence(at + 2 * call.exits),
          matrix(call.pair_divergence ? at + 3 * call.exits : nullptr) {}
};

INLINE double reciprocal(double x) { return x > 0 ? 1 / x : 0; }

// (3), (4) What the labels say of the whole batch.
struct Normalizers {
    double rows = 0, cross_entropy = 0;  // valid rows; the sum of their labels' class weights

    // r of the divergences, or of the cross entropies: a normalizer overrides the reduction.
    double r(const msdkern_loss &call, double counted) const {
        if (call.normalizer != 0) return 1 / call.normalizer;
        return call.mean ? reciprocal(counted) : 1;
    }
};

template <class Real>
static int count_rows(msdkern_loss &call, Normalizers &result) {
    const Real *weight = static_cast<const Real *>(call.class_weight);
    if (!call.label) {
        result.rows = result.cross_entropy = double(call.rows);
        return MSDKERN_OK;
    }
    int64_t rows = 0;
    double sum_of_weights = 0;
    for (int64_t n = 0; n < call.rows; ++n) {
        const int64_t label = call.label[n];
        if (label == call.ignore_index) continue;
        if (label < 0 || label >= call.classes) {
            call.bad_label = label;
            return MSDKERN_BAD_LABEL;
        }
        ++rows;
        if (weight) sum_of_weights += double(weight[label]);
    }
    result.rows = double(rows);
    result.cross_entropy = weight ? sum_of_weights : double(rows);
    return MSDKERN_OK;
}

// Adds the blocks' sums in order and writes the batch's values.
template <class Real>
static void finish(const msdkern_loss &call, const Normalizers &batch, double *sums,
                   int64_t blocks) {
    const int64_t fields = Partial::fields(call);
    for (int64_t b = 1; b < blocks; ++b)
        for (int64_t f = 0; f < fields; ++f) sums[f] += sums[b * fields + f];
    const Partial total(sums, call);
    const double r_ce = batch.r(call, batch.cross_entropy), r_rows = batch.r(call, batch.rows);
    const double per_row = reciprocal(batch.rows), per_label = reciprocal(batch.cross_entropy);
    double loss = 0;
    for (int k = 0; k < call.exits; ++k) {
        static_cast<Real *>(call.cross_entropy)[k] = Real(per_label * total.cross_entropy[k]);
        static_cast<Real *>(call.divergence_mean)[k] = Real(per_row * total.divergence[k]);
        loss += r_ce * total.weighted_ce[k] + r_rows * total.divergence[k];
    }
    *static_cast<Real *>(call.loss) = Real(loss);
    if (!total.matrix) return;
    for (int i = 0; i < call.exits * (call.exits + call.teachers); ++i)
        static_cast<Real *>(call.pair_divergence)[i] = Real(per_row * total.matrix[i]);
}

}  // namespace MSDKERN_NAMESPACE

// SPDX-License-Identifier: Apache-2.0
// (1) What the targets ask of the exits: cross entropies, and the scales of their gradients.
#pragma once

#include "batch.h"
#include "group.h"

namespace MSDKERN_NAMESPACE {

enum class Form { kScalar, kRows, kRowsBackward };

template <class S>
struct Targets {
    typedef typename Kind<S>::Real Real;
    typedef VecOf<Real> V;

    const msdkern_loss &call;
    const Form form;
    const int64_t classes;
    const bool dense;  // mass on many classes, not on one label
    Real factor;       // r of the cross entropies
    Real smoothing;
    double sum_of_weights;  // of class_weight, for label smoothing

    Targets(const msdkern_loss &c, Form f, const Normalizers &batch)
        : call(c),
          form(f),
          classes(c.classes),
          dense(c.target || (c.label && c.label_smoothing != 0)),
          factor(Real(batch.r(c, batch.cross_entropy))),
          smoothing(Real(c.label_smoothing / double(c.classes))),
          sum_of_weights(double(c.classes)) {
        if (!c.class_weight) return;
        sum_of_weights = 0;
        for (int64_t i = 0; i < classes; ++i) sum_of_weights += double(class_weight(i));
    }

    static const Real *real(const void *p) { return static_cast<const Real *>(p); }
    Real class_weight(int64_t c) const {
        return call.class_weight ? real(call.class_weight)[c] : Real(1);
    }
    Real exit_weight(int k, int64_t n) const {
        if (!call.exit_weight) return 1;
        return real(call.exit_weight)[call.exit_weight_per_row ? k * call.rows + n : k];
    }
    bool ignored(int64_t n) const { return call.label && call.label[n] == call.ignore_index; }

    // The mass u of sample n's target and its sum. Only a dense one is written out, to u[stride].
    Real mass(int64_t n, Real *u, int64_t stride) const {
        if (!dense) return call.label ? class_weight(call.label[n]) : Real(0);
        const Real keep = Real(1 - call.label_smoothing);
        double total = 0;
        if (call.label) {
            for (int64_t c = 0; c < classes; ++c) u[c] = smoothing * class_weight(c);
            const Real on_label = keep * class_weight(call.label[n]);
            u[call.label[n]] += on_label;
            total = double(smoothing) * sum_of_weights + double(on_label);
        } else {
            const Real *y = real(call.target) + n * classes;
            for (int64_t c = 0; c < classes; ++c) {
                u[c] = (y[c] * keep + smoothing) * class_weight(c);
                total += double(u[c]);
            }
        }
        for (int64_t c = classes; c < stride; ++c) u[c] = 0;
        return Real(total);
    }

    // CE and the scales of its gradient: numbers, or vectors where the lanes are samples.
    template <class Num>
    struct CrossEntropy {
        Num value, p_scale, mass_scale;
    };
    // Of a target whose mass, `total`, is on one label with logit z; a = dL/dCE.
    template <class Num>
    static CrossEntropy<Num> of_label(Num z, Num m, Num log_one, Num inverse_one, Num total,
                                      Num a) {
        return {total * (log_one - (z - m)), a * total * inverse_one, a * total};
    }
    // CE_k[n] from entry i of the group. u as above, total its sum.
    CrossEntropy<Real> cross_entropy(const Group<Real> &g, int i, int k, int64_t n, Real total,
                                     const Real *u) const {
        if (!call.label && !call.target) return {0, 0, 0};
        const S *row = static_cast<const S *>(call.logits[k]) + n * call.stride[k];
        const Real m = g.maximum[i], log_one = g.log_one[i], inverse_one = g.inverse_one[i];
        const Real upstream = form == Form::kRowsBackward
                                  ? real(call.upstream_cross_entropy)[k * call.rows + n]
                                  : factor;
        const Real a = upstream * exit_weight(k, n);
        if (dense) return {dense_cross_entropy(row, u, m, log_one), a * total * inverse_one, a};
        return of_label(number(row + call.label[n]), m, log_one, inverse_one, total, a);
    }
    static Real number(const S *p) { return load_partial(p, 1, Real(0))[0]; }

 private:
    Real dense_cross_entropy(const S *row, const Real *u, Real m, Real log_one) const {
        V total = V{};
        for_vectors(row, classes, m, [&](int64_t c, V z) __attribute__((always_inline)) {
            total += weigh(load(u + c), log_one - (z - m));
        });
        return sum<Real>(total);
    }
};

}  // namespace MSDKERN_NAMESPACE

// SPDX-License-Identifier: Apache-2.0
// The row formulas, one class (or one vector of classes) at a time, numbered as in
// msdkern/reference.py. V is a vector on the CPU and a float or double on a GPU; the including
// file provides weigh(p, x) and logarithm(x) for it.
//
// Student i, teacher j; q = softmax(z / T), l = log q. "d" is l relative to a common reference
// of the same class, which keeps differences between near-identical exits accurate.
#pragma once

#ifndef MSDKERN_NAMESPACE
#define MSDKERN_NAMESPACE msdkern
#endif
#ifndef MSDKERN_INLINE
#ifdef __CUDACC__
#define MSDKERN_INLINE static __host__ __device__ __forceinline__
#else
#define MSDKERN_INLINE static inline __attribute__((always_inline))
#endif
#endif
// A quotient that may be off by two units in the last place: of two sums that were rounded before.
#ifndef MSDKERN_QUOTIENT
#define MSDKERN_QUOTIENT(a, b) ((a) / (b))
#endif

namespace MSDKERN_NAMESPACE {

// (6) Gradient in z_i, less the factor 1 / T, of forward KL against all teachers of student i at
// once, and of soft cross entropy. mass = sum_j W_ij q_j, n = sum_j W_ij:
//     sum_j W_ij (q_i - q_j)
template <class V>
MSDKERN_INLINE V forward_kl_gradient(V q_i, V n, V mass) {
    return n * q_i - mass;
}

// (2) The value of forward KL, from that gradient and moment = sum_j W_ij q_j d_j:
//     sum_j W_ij [ q_j (l_j - l_i) + (q_i - q_j) ]
template <class V>
MSDKERN_INLINE V forward_kl_value(V gradient, V d_i, V mass, V moment) {
    return (moment - d_i * mass) + gradient;
}

// (2), (6) One pair: the value, and the derivatives with respect to l_i and l_j up to multiples
// of q_i and q_j, which the softmax Jacobian removes.
template <class V>
struct Pair {
    V value, of_student, of_teacher;
};

template <class V>
MSDKERN_INLINE Pair<V> forward_kl_pair(V q_i, V l_i, V q_j, V l_j) {
    V f = weigh(q_j, l_j - l_i);
    return {f + (q_i - q_j), -q_j, f};
}

template <class V>
MSDKERN_INLINE Pair<V> reverse_kl_pair(V q_i, V l_i, V q_j, V l_j) {
    V f = weigh(q_i, l_i - l_j);
    return {f + (q_j - q_i), f, -q_i};
}

template <class V>
MSDKERN_INLINE Pair<V> soft_ce_pair(V l_i, V q_j) {
    V f = weigh(q_j, l_i);
    return {-f, -q_j, -f};
}

// log(1 + x) for x > -1, accurate for small x: log u corrected by what 1 + x lost to rounding.
template <class V>
MSDKERN_INLINE V log_one_plus(V x) {
    // A ratio of probabilities. Bounded, so that neither end makes inf - inf or 0 / 0; NaN stays.
    x = x > 1e37f ? V{} + 1e37f : x;
    V u = x + 1;
    u = u < 1e-37f ? V{} + 1e-37f : u;
    return logarithm(u) + MSDKERN_QUOTIENT(x - (u - 1), u);
}

// The corrections (b - a) of the two KL terms cancel for the generalised JSD. With
// m = q_j + (1 - beta) (q_i - q_j), log(q / m) = -log1p((m - q) / q).
template <class V>
MSDKERN_INLINE Pair<V> jsd_pair(V q_i, V q_j, V beta) {
    V difference = q_i - q_j, alpha = 1 - beta;
    V teacher_gap = alpha * difference, student_gap = -beta * difference;  // m - q_j, m - q_i
    V f_j = weigh(q_j, -log_one_plus(MSDKERN_QUOTIENT(teacher_gap, q_j)));
    V f_i = weigh(q_i, -log_one_plus(MSDKERN_QUOTIENT(student_gap, q_i)));
    V value = beta * (f_j + teacher_gap) + alpha * (f_i + student_gap);
    return {value, alpha * f_i, beta * f_j};
}

// (6) dL/dz from h = dL/dl: (h - q sum_c h) / T.
template <class V>
MSDKERN_INLINE V softmax_jacobian(V h, V q, V total, V inverse_temperature) {
    return (h - q * total) * inverse_temperature;
}

// (1), (6) cross entropy: mass u on each class, U = sum_c u.
template <class V>
MSDKERN_INLINE V cross_entropy_gradient(V p, V u, V total) {
    return total * p - u;
}

}  // namespace MSDKERN_NAMESPACE

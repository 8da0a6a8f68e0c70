# SPDX-License-Identifier: Apache-2.0
"""Divergences between exits and their gradients, on one tile of classes of all exits.

`x` and `e` are tuples of tiles, (z - m) / T and its exponential, exits first and external teachers
after them; `inverse`, `gap` and `log_t` are tuples of rows: 1 / s, log s less the deepest exit's,
and log s. Loops over exits are unrolled.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .math import (
    FORWARD_KL,
    SOFT_CE,
    forward_kl_gradient,
    forward_kl_value,
    gap_between,
    pair_terms,
    weigh,
)

NONE = tl.constexpr(0)
MUTUAL = tl.constexpr(1)
LAST = tl.constexpr(2)
DEEPER = tl.constexpr(3)
NEXT = tl.constexpr(4)
DENSE = tl.constexpr(5)


# (3) Pair weights. Student i's divergence is share(i) sum_j w_ij D_ij with w_ij 0 or 1 for a named
# weight, and share 1 for a matrix.


@triton.constexpr_function
def share(pairs, exits, i):
    if pairs == 1:
        return 1.0 / max(exits - 1, 1)
    if pairs == 3 and i < exits - 1:
        return 1.0 / (exits - 1 - i)
    return 1.0


@triton.jit
def shares(k, PAIRS: tl.constexpr, K: tl.constexpr, REAL: tl.constexpr):
    """(3) By what sum_j D_ij of a named weight is multiplied: a vector [WIDTH]."""
    one = tl.full(k.shape, 1.0, REAL)
    if PAIRS == MUTUAL:
        one = one / tl.maximum(K - 1, 1)
    elif PAIRS == DEEPER:
        one = one / tl.maximum(K - 1 - k, 1)
    return one


@triton.constexpr_function
def teaches(pairs, exits, i, j):
    """Whether exit or teacher j may have weight for student i."""
    if pairs == 5:
        return True
    if pairs == 0 or j >= exits or i == j:
        return False
    if pairs == 1:
        return True
    if pairs == 3:
        return j > i
    return j > i and j == (exits - 1 if pairs == 2 else i + 1)


@triton.constexpr_function
def teachers_of(pairs, exits, i):
    """sum_j w_ij of a named weight."""
    return float({1: exits - 1, 3: exits - 1 - i}.get(int(pairs), int(i < exits - 1)))


@triton.constexpr_function
def only_teacher(pairs, exits, i):
    """The one teacher of student i for `last` and `next`."""
    return exits - 1 if pairs == 2 else min(i + 1, exits - 1)


@triton.jit
def weight_of(
    pair_weight, row, rows, i: tl.constexpr, j: tl.constexpr, PAIRS: tl.constexpr,
    PER_ROW: tl.constexpr, COUNT: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """w_ij of every row, share not included."""
    if PAIRS != DENSE:
        w = tl.full(row.shape, 1.0, REAL)
    elif PER_ROW:
        w = tl.load(pair_weight + (i * COUNT + j) * rows + row, mask=row < rows, other=0)
    else:
        w = tl.load(pair_weight + (i * COUNT + j) + 0 * row)
    return w


# Forward KL and soft cross entropy with detached teachers ---------------------------------------


@triton.jit
def mutual_sums(
    x, e, inverse, gap, reference_x, reference_q, K: tl.constexpr, WITH_MOMENT: tl.constexpr
):
    """sum_k (q_k - q_K) and sum_k q_k d_k. Differences from the deepest exit's probabilities are
    exact where exits agree."""
    excess = 0 * reference_q
    moment = 0 * reference_q
    for k in tl.static_range(K):
        q = e[k] * inverse[k][:, None]
        excess += q - reference_q
        if WITH_MOMENT:
            moment += weigh(q, (x[k] - reference_x) - gap[k][:, None])
    return excess, moment


@triton.jit
def one_teacher(
    x, e, inverse, gap, log_t, i: tl.constexpr, j: tl.constexpr, DIVERGENCE: tl.constexpr
):
    """`last` and `next`: (2) the value, and (6) the gradient less 1 / T."""
    q_i = e[i] * inverse[i][:, None]
    q_j = e[j] * inverse[j][:, None]
    gradient = forward_kl_gradient(q_i, 1.0, q_j)
    if DIVERGENCE == SOFT_CE:
        value = -weigh(q_j, x[i] - log_t[i][:, None])
    else:
        d = (x[i] - x[j]) + gap_between(inverse[j], inverse[i], gap[j], gap[i])[:, None]
        value = forward_kl_value(gradient, d, q_j, 0.0)
    return value, gradient


@triton.jit
def any_teachers(
    x, e, inverse, gap, log_t, pair_weight, row, rows, i: tl.constexpr,
    PER_ROW: tl.constexpr, DIVERGENCE: tl.constexpr, COUNT: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """A matrix of weights: K multiply-adds per element and student. The student is the reference
    of d: the deepest exit need not teach it, and may be far away."""
    q_i = e[i] * inverse[i][:, None]
    mass = tl.zeros(q_i.shape, REAL)
    moment = mass
    n = tl.zeros(row.shape, REAL)
    for j in tl.static_range(COUNT):
        w = weight_of(pair_weight, row, rows, i, j, 5, PER_ROW, COUNT, REAL)
        n += w
        # A teacher without weight may hold NaN.
        taught = tl.where(w[:, None] == 0, 0.0, e[j] * (w * inverse[j])[:, None])
        mass += taught
        if DIVERGENCE == FORWARD_KL:
            between = gap_between(inverse[i], inverse[j], gap[i], gap[j])
            moment += weigh(taught, (x[j] - x[i]) + between[:, None])
    gradient = forward_kl_gradient(tl.where(n[:, None] == 0, 0.0, q_i), n[:, None], mass)
    if DIVERGENCE == SOFT_CE:
        value = -weigh(mass, x[i] - log_t[i][:, None])
    else:
        value = moment + gradient
    return value, gradient


# Every divergence, teachers detached or not -----------------------------------------------------


@triton.jit
def pair_tile(
    x, e, inverse, gap, log_t, beta, i: tl.constexpr, j: tl.constexpr, DIVERGENCE: tl.constexpr
):
    q_i = e[i] * inverse[i][:, None]
    q_j = e[j] * inverse[j][:, None]
    d = (x[j] - x[i]) + gap_between(inverse[i], inverse[j], gap[i], gap[j])[:, None]
    return pair_terms(q_i, q_j, d, x[i] - log_t[i][:, None], beta, DIVERGENCE)


@triton.jit
def weighted_pair(
    w, x, e, inverse, gap, log_t, beta, i: tl.constexpr, j: tl.constexpr, DIVERGENCE: tl.constexpr
):
    """pair_tile, of no account where w is 0. No pair begins before its weight is there: else the
    compiler begins those of the next students, too, for whose numbers it has no registers."""
    both = (tl.where(w == 0, 1.0, inverse[i]), tl.where(w == 0, 1.0, inverse[j]))
    return pair_tile(
        (x[i], x[j]), (e[i], e[j]), both, (gap[i], gap[j]), (log_t[i], log_t[j]), beta, 0, 1,
        DIVERGENCE,
    )  # fmt: skip


@triton.jit
def pairs_of(
    x, e, inverse, gap, log_t, beta, pair_weight, row, rows, coefficient, k: tl.constexpr,
    PAIRS: tl.constexpr, PER_ROW: tl.constexpr, DIVERGENCE: tl.constexpr, DETACH: tl.constexpr,
    K: tl.constexpr, COUNT: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """Exit k, pair by pair: sum_j w_kj D_kj as its student, and dL/dl_k, also of what it teaches,
    for dL/dD_i = coefficient_i."""
    value = tl.zeros(x[k].shape, REAL)
    h = tl.zeros(x[k].shape, REAL)
    for j in tl.static_range(COUNT):
        if teaches(PAIRS, K, k, j):
            w = weight_of(pair_weight, row, rows, k, j, PAIRS, PER_ROW, COUNT, REAL)
            v, student, _ = weighted_pair(w, x, e, inverse, gap, log_t, beta, k, j, DIVERGENCE)
            value += weigh(w[:, None], v)
            h += weigh(w[:, None], student)
    h = weigh(coefficient[k][:, None], h)
    if not DETACH:
        for i in tl.static_range(K):
            if teaches(PAIRS, K, i, k):
                w = weight_of(pair_weight, row, rows, i, k, PAIRS, PER_ROW, COUNT, REAL)
                _, _, teacher = weighted_pair(w, x, e, inverse, gap, log_t, beta, i, k, DIVERGENCE)
                h += weigh((w * coefficient[i])[:, None], teacher)
    return value, h

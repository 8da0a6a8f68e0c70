# SPDX-License-Identifier: Apache-2.0
"""Pairs of many exits: all students, an axis of the tile, meet one exit or teacher after the other.

That one is known only at run time, so that neither the code nor what a thread holds grows with
their number. Its logits are read again, from the nearest cache; what else is known of it by row,
its `facts`, lies in memory, a vector [WIDTH] each.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .divergences import DEEPER, DENSE, LAST, MUTUAL
from .math import (
    FORWARD_KL,
    SOFT_CE,
    forward_kl_gradient,
    gap_between,
    pair_terms,
    weigh,
)
from .rows import at, exit_of

FACTS = tl.constexpr(5)  # maximum, 1 / s, gap, log s, and dL/dD


@triton.jit
def softmax_tile(where, there, c, classes, m, inverse_t, inverse, REAL: tl.constexpr):
    """x, e and q of one block of classes; e and q are 0 for exits that are not there, whatever is
    given of them: a teacher without weight may hold NaN."""
    m, inverse = tl.where(there, m, 0.0), tl.where(there, inverse, 0.0)
    inside = there[:, None] & (c < classes)[None, :]
    z = tl.load(where[:, None] + c[None, :], mask=inside, other=float("-inf")).to(REAL)
    x = (z - m[:, None]) * inverse_t
    e = tl.exp(x)
    return x, e, e * inverse[:, None]


@triton.jit
def store_facts(facts, k, m, inverse, gap, log_t, coefficient, WIDTH: tl.constexpr):
    tl.store(facts + k, m)
    tl.store(facts + WIDTH + k, inverse)
    tl.store(facts + 2 * WIDTH + k, gap)
    tl.store(facts + 3 * WIDTH + k, log_t)
    tl.store(facts + 4 * WIDTH + k, coefficient)
    tl.debug_barrier()  # what one thread has written, all read


@triton.jit
def partner(
    z, strides, n, j, c, classes, facts, inverse_t, COUNT: tl.constexpr, WIDTH: tl.constexpr,
    STEP: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """x and e [1, BLOCK] of exit or teacher j, its 1 / s, gap and log s."""
    where = at(exit_of(z, j, COUNT), n, exit_of(strides, j, COUNT), STEP)
    z_j = tl.load(where + c[None, :], mask=(c < classes)[None, :], other=float("-inf")).to(REAL)
    x = (z_j - tl.load(facts + j)) * inverse_t
    inverse, gap = tl.load(facts + WIDTH + j), tl.load(facts + 2 * WIDTH + j)
    return x, tl.exp(x), inverse, gap, tl.load(facts + 3 * WIDTH + j)


@triton.jit
def weights_of(
    pair_weight, i, j, n, rows, PAIRS: tl.constexpr, PER_ROW: tl.constexpr, K: tl.constexpr,
    COUNT: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """(3) w_ij, share not included, one of i and j a vector [WIDTH], and 0 beyond their ranges."""
    inside = (i < K) & (j < COUNT)
    if PAIRS == DENSE:
        place = i * COUNT + j
        if PER_ROW:
            place = place.to(tl.int64) * rows + n
        w = tl.load(pair_weight + place, mask=inside, other=0)
    else:
        teaches = i + 1 == j
        if PAIRS == MUTUAL:
            teaches = i != j
        elif PAIRS == LAST:
            teaches = (i < j) & (j == K - 1)
        elif PAIRS == DEEPER:
            teaches = i < j
        w = tl.where(inside & teaches & (j < K), 1.0, 0.0).to(REAL)
    return w


@triton.jit
def any_teachers(
    z, strides, n, c, classes, facts, inverse_t, x, q, inverse, gap, log_t, k, pair_weight, rows,
    PER_ROW: tl.constexpr, DIVERGENCE: tl.constexpr, K: tl.constexpr, COUNT: tl.constexpr,
    WIDTH: tl.constexpr, STEP: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """A matrix of weights and teachers that are detached: (2) values, and (6) gradients less
    1 / T, K multiply-adds per element."""
    mass = tl.zeros(q.shape, REAL)
    moment = mass
    total = tl.zeros(k.shape, REAL)
    for j in range(0, COUNT):
        y, e, inverse_j, gap_j, _ = partner(
            z, strides, n, j, c, classes, facts, inverse_t, COUNT, WIDTH, STEP, REAL
        )
        w = weights_of(pair_weight, k, j, n, rows, DENSE, PER_ROW, K, COUNT, REAL)
        total += w
        # A teacher without weight may hold NaN.
        taught = tl.where(w[:, None] == 0, 0.0, e * (w * inverse_j)[:, None])
        mass += taught
        if DIVERGENCE == FORWARD_KL:
            between = gap_between(inverse, inverse_j, gap, gap_j)
            moment += weigh(taught, (y - x) + between[:, None])
    step = forward_kl_gradient(tl.where(total[:, None] == 0, 0.0, q), total[:, None], mass)
    if DIVERGENCE == SOFT_CE:
        value = -weigh(mass, x - log_t[:, None])
    else:
        value = moment + step
    return value, step


@triton.jit
def one_pair(x, q, inverse, gap, log_t, y, q_j, inverse_j, gap_j, beta, DIVERGENCE: tl.constexpr):
    """(2), (6) Students x, q and a teacher y, q_j, or one of them all and the other one."""
    d = (y - x) + gap_between(inverse, inverse_j, gap, gap_j)
    return pair_terms(q, q_j, d, x - log_t, beta, DIVERGENCE)


@triton.jit
def pairs_of(
    z, strides, n, c, classes, facts, inverse_t, x, q, inverse, gap, log_t, coefficient, beta, k,
    pair_weight, rows, PAIRS: tl.constexpr, PER_ROW: tl.constexpr, DIVERGENCE: tl.constexpr,
    DETACH: tl.constexpr, K: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr,
    STEP: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """Every exit, pair by pair: sum_j w_kj D_kj as a student, and dL/dl_k, also of what it
    teaches."""
    value = tl.zeros(q.shape, REAL)
    h = value
    inverse, gap, log_t = inverse[:, None], gap[:, None], log_t[:, None]
    for j in range(0, COUNT):
        y, e, inverse_j, gap_j, log_j = partner(
            z, strides, n, j, c, classes, facts, inverse_t, COUNT, WIDTH, STEP, REAL
        )
        q_j = e * inverse_j
        w = weights_of(pair_weight, k, j, n, rows, PAIRS, PER_ROW, K, COUNT, REAL)
        v, student, _ = one_pair(
            x, q, inverse, gap, log_t, y, q_j, inverse_j, gap_j, beta, DIVERGENCE
        )
        value += weigh(w[:, None], v)
        h += weigh((w * coefficient)[:, None], student)
        if not DETACH:
            w = weights_of(pair_weight, j, k, n, rows, PAIRS, PER_ROW, K, COUNT, REAL)
            _, _, teacher = one_pair(
                y, q_j, inverse_j, gap_j, log_j, x, q, inverse, gap, beta, DIVERGENCE
            )
            h += weigh((w * tl.load(facts + 4 * WIDTH + j))[:, None], teacher)
    return value, h


@triton.jit
def store_pairs(
    z, strides, n, where, there, classes, facts, inverse_t, m, inverse, gap, log_t, beta, k,
    valid, place, DIVERGENCE: tl.constexpr, K: tl.constexpr, COUNT: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """D_ij of all pairs, by a sweep for every j: all sums at once would not fit registers."""
    for j in range(0, COUNT):
        total = tl.zeros((WIDTH, BLOCK), REAL)
        for b in range(0, tl.cdiv(classes, BLOCK)):
            c = b * BLOCK + tl.arange(0, BLOCK)
            x, _, q = softmax_tile(where, there, c, classes, m, inverse_t, inverse, REAL)
            y, e, inverse_j, gap_j, _ = partner(
                z, strides, n, j, c, classes, facts, inverse_t, COUNT, WIDTH, STEP, REAL
            )
            v, _, _ = one_pair(
                x, q, inverse[:, None], gap[:, None], log_t[:, None], y, e * inverse_j,
                inverse_j, gap_j, beta, DIVERGENCE,
            )  # fmt: skip
            total += v
        d = tl.where(valid, tl.sum(total, 1), 0.0)
        tl.store(place + k * COUNT + j, d, mask=k < K)

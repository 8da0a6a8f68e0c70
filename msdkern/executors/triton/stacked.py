# SPDX-License-Identifier: Apache-2.0
"""The loss of many exits: they are an axis of the tile, so that the code does not grow with them.

Forward KL and soft cross entropy with detached teachers and named pair weights, in O(K); with a
matrix of weights, and every other divergence, pair by pair in a loop. A program takes one sample; a
tile is [WIDTH, BLOCK], exits and teachers by classes, and what the other kernel keeps of every exit
by itself is one vector [WIDTH] here, spread over the threads. Classes are swept as there: once for
the normalisers, then from the last block back to the first.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .batch import finish, store_counts
from .cross_entropy import (
    LABELS,
    NO_TARGET,
    mass_tile,
    mass_total,
    mean_shares,
    read_labels,
    smoothing_of,
)
from .divergences import DEEPER, DENSE, LAST, MUTUAL, NEXT, NONE, shares
from .math import (
    JSD,
    SOFT_CE,
    forward_kl_gradient,
    forward_kl_value,
    gap_between,
    scalar,
    scales,
    softmax_jacobian,
    weigh,
)
from .rows import at, batch_is_complete, gap_to
from .stacked_pairs import (
    FACTS,
    any_teachers,
    pairs_of,
    softmax_tile,
    store_facts,
    store_pairs,
)
from .sweeps import LARGE, ROW_BACKWARD, SCALAR, label_gradient, swept_rows


@triton.constexpr_function
def present_one(pointers):
    """An exit that has a pointer."""
    return next(i for i, pointer in enumerate(pointers) if pointer is not None)


@triton.jit
def stack(pointers, strides, row, k, K: tl.constexpr, STEP: tl.constexpr, SHIFT: tl.constexpr):
    """[WIDTH] pointers to a row of exit k + SHIFT, and whether there is one."""
    ANY: tl.constexpr = present_one(pointers)
    where = at(pointers[ANY], row, strides[ANY], STEP) + 0 * k
    there = k < 0
    for i in tl.static_range(K):
        if pointers[i] is not None:
            mine = k + SHIFT == i
            where = tl.where(mine, at(pointers[i], row, strides[i], STEP), where)
            there = there | mine
    return where, there


@triton.jit
def of_next(x, k):
    """x[k + 1], and 0 where there is none: a vector [WIDTH]."""
    return tl.sum(tl.where((k + 1)[:, None] == k[None, :], x[None, :], 0.0), 1)


@triton.jit
def of_deepest(x, k, K: tl.constexpr):
    """The deepest exit's classes [1, BLOCK]."""
    return tl.sum(tl.where((k == K - 1)[:, None], x, 0.0), 0)[None, :]


@triton.jit
def store_gradients(target, wanted, c, classes, valid, g):
    """Rounded once; nothing on ignored rows."""
    g = tl.where(valid[:, None], g, 0.0).to(target.dtype.element_ty)
    inside = wanted[:, None] & (c < classes)[None, :]
    tl.store(target[:, None] + c[None, :], g, mask=inside, cache_modifier=".cs")


@triton.jit
def stacked_tile(
    where, learns, mass, block, row, present, classes, m, inverse_t, inverse,
    TARGET: tl.constexpr, DENSE_TARGET: tl.constexpr, BLOCK: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """One block of classes: which they are, x, e and q of all exits, and u."""
    c = block * BLOCK + tl.arange(0, BLOCK)
    x, e, q = softmax_tile(where, learns, c, classes, m, inverse_t, inverse, REAL)
    u = tl.zeros((1, BLOCK), REAL)
    if DENSE_TARGET:
        inside = present[:, None] & (c < classes)[None, :]
        u = mass_tile(mass, row, c, inside, classes, TARGET, REAL)
    return c, x, e, q, u


@triton.jit
def one_teacher(
    x, q, inverse, gap, log_t, y, taught, inverse_y, gap_y, has_teacher, DIVERGENCE: tl.constexpr
):
    """`last` and `next`: (2) values, and (6) gradients less 1 / T. `taught` is q of the teacher."""
    step = tl.where(has_teacher, forward_kl_gradient(q, 1.0, taught), 0.0)
    if DIVERGENCE == SOFT_CE:
        value = -weigh(taught, x - log_t[:, None])
    else:
        d = (x - y) + gap_between(inverse_y, inverse, gap_y, gap)[:, None]
        value = forward_kl_value(step, d, taught, 0.0)
    return tl.where(has_teacher, value, 0.0), step


@triton.jit
def all_students(
    x, q, inverse, gap, log_t, y, q_next, k, PAIRS: tl.constexpr, DIVERGENCE: tl.constexpr,
    K: tl.constexpr,
):  # fmt: skip
    """(2) Values of every exit as a student, and (6) gradients less 1 / T, on one tile. y and
    q_next are x and q of the next deeper exit."""
    has_teacher = (k < K - 1)[:, None]
    deepest = of_deepest(x, k, K)
    deepest_q = of_deepest(q, k, K)
    if PAIRS == NEXT:
        value, step = one_teacher(
            x, q, inverse, gap, log_t, y, q_next, of_next(inverse, k), of_next(gap, k),
            has_teacher, DIVERGENCE,
        )  # fmt: skip
    elif PAIRS == LAST:
        inverse_y = tl.sum(tl.where(k == K - 1, inverse, 0.0), 0) + 0 * gap
        value, step = one_teacher(
            x, q, inverse, gap, log_t, deepest, deepest_q, inverse_y, 0 * gap, has_teacher,
            DIVERGENCE,
        )  # fmt: skip
    else:
        # Any finite reference is as good where the deepest exit's class is masked.
        reference = tl.where(deepest == float("-inf"), 0.0, deepest)
        d = (x - reference) - gap[:, None]
        if PAIRS == MUTUAL:
            # The student's own share adds nothing, so one sum serves all.
            excess = tl.sum(tl.where((k < K)[:, None], q - deepest_q, 0.0), 0)[None, :]
            mass = excess + K * deepest_q
            moment = tl.sum(weigh(q, d), 0)[None, :]
            step = forward_kl_gradient(q - deepest_q, K, excess)
            others = mass - q
        else:
            mass = tl.cumsum(q_next, 0, reverse=True)
            moment = weigh(q_next, (y - reference) - of_next(gap, k)[:, None])
            moment = tl.cumsum(moment, 0, reverse=True)
            step = forward_kl_gradient(q, (K - 1 - k).to(x.dtype)[:, None], mass)
            step = tl.where(has_teacher, step, 0.0)
            others = mass
        if DIVERGENCE == SOFT_CE:
            value = -weigh(others, x - log_t[:, None])
        else:
            value = forward_kl_value(step, d, mass, moment)
        if PAIRS == DEEPER:
            value = tl.where(has_teacher, value, 0.0)
    return value, step


@triton.jit
def stacked_kernel(
    z, strides, gradient, label, probability, probability_stride, class_weight, exit_weight,
    pair_weight, upstream_ce, upstream_divergence, temperature, pair_scale, normalizer, smoothing,
    beta, loss, cross_entropy, divergence, matrix, prediction, confidence, counts, sums,
    group_sums, tickets, facts, ignore_index, rows, class_steps,
    POINTERS: tl.constexpr, FORM: tl.constexpr, PAIRS: tl.constexpr, DIVERGENCE: tl.constexpr,
    DETACH: tl.constexpr, SQUARED: tl.constexpr, MEAN: tl.constexpr, NORMALIZED: tl.constexpr,
    COUNTING: tl.constexpr, GRADIENT: tl.constexpr, MATRIX: tl.constexpr, TARGET: tl.constexpr,
    SMOOTH: tl.constexpr, EXIT_ROWS: tl.constexpr, PAIR_ROWS: tl.constexpr,
    RESIDENT: tl.constexpr, STEP: tl.constexpr, K: tl.constexpr, COUNT: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """Takes what `loss_kernel` takes, and memory for facts where pairs are met one by one."""
    DIVERGENT: tl.constexpr = PAIRS != NONE or MATRIX
    DIRECT: tl.constexpr = PAIRS == 0 or (DETACH and (DIVERGENCE == 0 or DIVERGENCE == 3))
    DENSE_TARGET: tl.constexpr = TARGET == 2 or (TARGET == 1 and SMOOTH)
    FIELDS: tl.constexpr = 3 * K + 2 + (K * COUNT if MATRIX else 0)
    classes = class_steps * STEP
    n = tl.program_id(0).to(tl.int64)
    row = n + tl.arange(0, 1)
    k = tl.arange(0, WIDTH)
    where, there = stack(z, strides, n, k, COUNT, STEP, 0)
    learns = k < K
    place = k.to(tl.int64) * rows + n
    t, scale, inverse_t = scales(temperature, pair_scale, POINTERS, SQUARED, DIVERGENT, REAL)
    b = inverse_t
    if DIVERGENCE == JSD:
        b = scalar(beta, POINTERS & 16, REAL)
    valid, y, known, poison, label_weight = read_labels(
        label, class_weight, ignore_index, row, row < rows, classes, TARGET, REAL
    )

    # Softmaxes: exits as rows.
    m, s, one, index = swept_rows(
        (where,), (0,), 0 * place, there, classes, inverse_t, 1, 1, DIVERGENT, FORM == SCALAR,
        STEP, WIDTH, BLOCK, REAL,
    )  # fmt: skip
    m, index = m[0], index[0]
    m = tl.where(there, m, 0.0)
    s = tl.where(there, s[0], 1.0)
    one = tl.where(there, one[0], 1.0)
    inverse = 1 / s
    gap = gap_to(tl.sum(tl.where(k == K - 1, inverse, 0.0), 0), inverse)
    if FORM == SCALAR:
        tl.store(confidence + place, 1 / one, mask=learns)
        first = tl.where(index < 0, index + LARGE, index)
        tl.store(prediction + place, first.to(tl.int64), mask=learns)

    # (1) Cross entropies, and the scales of gradients.
    smooth, keep = smoothing_of(smoothing, classes, POINTERS, SMOOTH, REAL)
    on_label = label_weight * keep if DENSE_TARGET else label_weight
    mass = (probability, probability_stride, class_weight, y, on_label, smooth, keep)
    total_mass = on_label
    if DENSE_TARGET:
        total_mass = mass_total(mass, row, row < rows, classes, TARGET, 1, BLOCK, REAL)
    log_t, log_one = tl.log(s), tl.log(one)
    # Not before the first sweep, which would have to hold them.
    r_ce, r_row = mean_shares(
        label, class_weight, ignore_index, normalizer, counts, rows, classes, POINTERS, MEAN,
        NORMALIZED, COUNTING, REAL,
    )  # fmt: skip
    up_ce, up_divergence = tl.broadcast_to(r_ce, k.shape), tl.broadcast_to(r_row, k.shape)
    if FORM == ROW_BACKWARD:
        up_ce = tl.load(upstream_ce + place, mask=learns, other=0)
        up_divergence = tl.load(upstream_divergence + place, mask=learns, other=0)
    a = tl.full((WIDTH,), 1.0, REAL)
    if exit_weight is not None:
        a = tl.load(exit_weight + (place if EXIT_ROWS else k), mask=learns, other=0)
    ce = poison + 0 * m
    if TARGET == LABELS and not DENSE_TARGET:
        z_y = tl.load(where + y, mask=learns & known, other=0).to(REAL)
        ce = on_label * (log_one - (z_y - m)) + poison
    label_scale = a * up_ce if TARGET != NO_TARGET else 0 * one
    p_scale = label_scale * total_mass / one + poison
    u_scale = label_scale if DENSE_TARGET else label_scale * on_label
    of_pairs = shares(k, PAIRS, K, REAL)
    coefficient = up_divergence * scale * of_pairs
    pair_factor = coefficient * inverse_t
    if facts is not None:
        facts += n * FACTS * WIDTH
        store_facts(facts, k, m, inverse, gap, log_t, coefficient, WIDTH)

    # (2), (6) Divergences and gradients.
    value = tl.zeros((WIDTH, BLOCK), REAL)
    total = tl.zeros((WIDTH, BLOCK), REAL)
    dense_ce = tl.zeros((WIDTH, BLOCK), REAL)
    back = t if DIVERGENT else 1.0  # from x at the temperature to x at 1
    blocks = tl.cdiv(classes, BLOCK)
    if DIRECT and (PAIRS == NEXT or PAIRS == DEEPER):
        after, has_next = stack(z, strides, n, k, K, STEP, 1)
        m_next, inverse_next = of_next(m, k), of_next(inverse, k)
    if GRADIENT:
        target, wanted = stack(gradient, (class_steps,) * K, n, k, K, STEP, 0)
    if PAIRS != NONE or GRADIENT or DENSE_TARGET:
        for i in range(0, blocks):
            c, x, e, q, u = stacked_tile(
                where, learns, mass, blocks - 1 - i, row, row < rows, classes, m, inverse_t,
                inverse, TARGET, DENSE_TARGET, BLOCK, REAL,
            )  # fmt: skip
            if DENSE_TARGET:
                dense_ce += weigh(u, log_one[:, None] - x * back)
            step = tl.zeros((WIDTH, BLOCK), REAL)
            if not DIRECT:
                v, h = pairs_of(
                    z, strides, n, c, classes, facts, inverse_t, x, q, inverse, gap, log_t,
                    coefficient, b, k, pair_weight, rows, PAIRS, PAIR_ROWS, DIVERGENCE, DETACH, K,
                    COUNT, WIDTH, STEP, REAL,
                )  # fmt: skip
                value += v
                total += h
            elif PAIRS == DENSE:
                v, step = any_teachers(
                    z, strides, n, c, classes, facts, inverse_t, x, q, inverse, gap, log_t, k,
                    pair_weight, rows, PAIR_ROWS, DIVERGENCE, K, COUNT, WIDTH, STEP, REAL,
                )  # fmt: skip
                value += v
            elif PAIRS != NONE:
                x_next, q_next = x, q
                if PAIRS == NEXT or PAIRS == DEEPER:
                    x_next, _, q_next = softmax_tile(
                        after, has_next, c, classes, m_next, inverse_t, inverse_next, REAL
                    )
                v, step = all_students(
                    x, q, inverse, gap, log_t, x_next, q_next, k, PAIRS, DIVERGENCE, K
                )
                value += v
            if GRADIENT and DIRECT:
                g = label_gradient(
                    x, e, u, c, y, t, p_scale, u_scale, DIVERGENT, TARGET, DENSE_TARGET
                )
                g = tl.fma(step, pair_factor[:, None], g)
                store_gradients(target, wanted, c, classes, valid, g)
    if GRADIENT and not DIRECT:
        sum_h = tl.sum(total, 1)[:, None]
        for i in range(0, blocks):
            c, x, e, q, u = stacked_tile(
                where, learns, mass, i, row, row < rows, classes, m, inverse_t,
                inverse, TARGET, DENSE_TARGET, BLOCK, REAL,
            )  # fmt: skip
            _, h = pairs_of(
                z, strides, n, c, classes, facts, inverse_t, x, q, inverse, gap, log_t,
                coefficient, b, k, pair_weight, rows, PAIRS, PAIR_ROWS, DIVERGENCE, DETACH, K,
                COUNT, WIDTH, STEP, REAL,
            )  # fmt: skip
            g = softmax_jacobian(h, q, sum_h, inverse_t)
            g += label_gradient(x, e, u, c, y, t, p_scale, u_scale, True, TARGET, DENSE_TARGET)
            store_gradients(target, wanted, c, classes, valid, g)

    # (3) Sums.
    if DENSE_TARGET:
        ce = tl.sum(dense_ce, 1) + poison
    ce = tl.where(valid, ce, 0.0)
    d = tl.where(valid, tl.sum(value, 1) * of_pairs * scale, 0.0)
    mine = sums + n * FIELDS + k if FORM == SCALAR else sums
    if FORM == SCALAR:
        tl.store(mine, ce, mask=learns)
        tl.store(mine + K, a * ce, mask=learns)
        tl.store(mine + 2 * K, d, mask=learns)
        WEIGHTED: tl.constexpr = TARGET == LABELS and class_weight is not None
        store_counts(sums + n * FIELDS + 3 * K, valid, label_weight, WEIGHTED)
        if MATRIX:
            store_pairs(
                z, strides, n, where, learns, classes, facts, inverse_t, m, inverse, gap, log_t,
                b, k, valid, sums + n * FIELDS + 3 * K + 2, DIVERGENCE, K, COUNT, WIDTH, BLOCK,
                STEP, REAL,
            )  # fmt: skip
        if batch_is_complete(sums, group_sums, tickets, FIELDS):
            finish(
                group_sums, loss, cross_entropy, divergence, matrix, r_row, MEAN, NORMALIZED,
                MATRIX, K, COUNT, WIDTH, FIELDS,
            )  # fmt: skip
    elif FORM != ROW_BACKWARD:
        tl.store(cross_entropy + place, a * ce, mask=learns)
        tl.store(divergence + place, d, mask=learns)

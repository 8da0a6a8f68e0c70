# SPDX-License-Identifier: Apache-2.0
"""Softmaxes of all exits of a few samples, and the work on one tile of their classes.

WIDE means that classes come block by block; sums over them are then kept per lane to the end.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .cross_entropy import LABELS, mass_tile
from .divergences import (
    DEEPER,
    DENSE,
    LAST,
    MUTUAL,
    NEXT,
    NONE,
    any_teachers,
    mutual_sums,
    one_teacher,
    only_teacher,
    pair_tile,
    pairs_of,
    teachers_of,
)
from .math import (
    FORWARD_KL,
    SOFT_CE,
    forward_kl_gradient,
    forward_kl_value,
    softmax_jacobian,
    weigh,
)
from .rows import add, at, close, first_class, load_exits, put, store_columns

SCALAR = tl.constexpr(0)
ROW_LOSSES = tl.constexpr(1)
ROW_BACKWARD = tl.constexpr(2)
LARGE = tl.constexpr(1 << 30)  # beyond every class


@triton.constexpr_function
def power_of_two(n):
    return 1 << (int(n) - 1).bit_length()


# Softmaxes --------------------------------------------------------------------------------------


@triton.jit
def held_rows(
    z, c, inverse_t, K: tl.constexpr, COUNT: tl.constexpr, DIVERGENT: tl.constexpr,
    PREDICT: tl.constexpr,
):  # fmt: skip
    """RESIDENT: x, e, and per row the maxima, sums of exponentials at T and at 1, and argmax."""
    x, e, m, s, one, index = (), (), (), (), (), ()
    for r in tl.static_range(COUNT):
        m = m + (tl.max(z[r], 1),)
        gap = z[r] - m[r][:, None]
        x = x + (gap * inverse_t,)
        e = e + (tl.exp(x[r]),)
        s = s + (tl.sum(e[r], 1),)
        if r < K:
            one = one + ((tl.sum(tl.exp(gap), 1) if DIVERGENT else s[r]),)
            if PREDICT:
                index = index + (first_class(z[r], c, m[r], LARGE),)
    return x, e, m, s, one, index


@triton.jit
def swept_rows(
    z, strides, row, present, classes, inverse_t, K: tl.constexpr, COUNT: tl.constexpr,
    DIVERGENT: tl.constexpr, PREDICT: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """The same per row by one sweep; sums are kept per lane, relative to the maximum so far."""
    m, s, one, index = (), (), (), ()
    for r in tl.static_range(COUNT):
        m = m + (tl.full((ROWS,), float("-inf"), REAL),)
        s = s + (tl.zeros((ROWS, BLOCK), REAL),)
        if r < K:
            one = one + (tl.zeros((ROWS, BLOCK), REAL),)
            index = index + (tl.zeros((ROWS,), tl.int32),)
    for b in range(0, tl.cdiv(classes, BLOCK)):
        c = b * BLOCK + tl.arange(0, BLOCK)
        inside = present[:, None] & (c < classes)[None, :]
        z_b = load_exits(z, strides, row, c, inside, COUNT, STEP, REAL)
        m_b, s_b, one_b, index_b = (), (), (), ()
        for r in tl.static_range(COUNT):
            best = tl.max(z_b[r], 1)
            top = tl.maximum(m[r], best)
            safe = tl.where(top == float("-inf"), 0.0, top)  # all -inf so far: no NaN yet
            gap = z_b[r] - safe[:, None]
            shrink = m[r] - safe
            m_b = m_b + (top,)
            if DIVERGENT:
                grown = s[r] * tl.exp(shrink * inverse_t)[:, None] + tl.exp(gap * inverse_t)
                s_b = s_b + (grown,)
            else:
                s_b = s_b + (s[r],)
            if r < K:
                one_b = one_b + (one[r] * tl.exp(shrink)[:, None] + tl.exp(gap),)
                if PREDICT:
                    found = first_class(z_b[r], c, best, LARGE)
                    newer = (index[r] >= 0) & ((best > m[r]) | (found < 0))
                    index_b = index_b + (tl.where(newer, found, index[r]),)
                else:
                    index_b = index_b + (index[r],)
        m, s, one, index = m_b, s_b, one_b, index_b
    sums, sums_one = (), ()
    for r in tl.static_range(COUNT):
        nothing = tl.where(m[r] == float("-inf"), float("nan"), 0.0)
        if r < K:
            sums_one = sums_one + (tl.sum(one[r], 1) + nothing,)
        if DIVERGENT:
            sums = sums + (tl.sum(s[r], 1) + nothing,)
        else:
            sums = sums + (sums_one[r],)
    return m, sums, sums_one, index


@triton.jit
def exponentials(z, m, inverse_t, COUNT: tl.constexpr):
    """x and e of one block of classes."""
    x, e = (), ()
    for r in tl.static_range(COUNT):
        x = x + ((z[r] - m[r][:, None]) * inverse_t,)
        e = e + (tl.exp(x[r]),)
    return x, e


@triton.jit
def swept_tile(
    z, strides, m, mass, block, row, present, classes, inverse_t, TARGET: tl.constexpr,
    DENSE_TARGET: tl.constexpr, COUNT: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """One block of classes: which they are and whether they are there, x and e of all exits, u."""
    c = block * BLOCK + tl.arange(0, BLOCK)
    inside = present[:, None] & (c < classes)[None, :]
    tile = load_exits(z, strides, row, c, inside, COUNT, STEP, REAL)
    x, e = exponentials(tile, m, inverse_t, COUNT)
    u = tl.zeros((ROWS, BLOCK), REAL)
    if DENSE_TARGET:
        u = mass_tile(mass, row, c, inside, classes, TARGET, REAL)
    return c, inside, x, e, u


@triton.jit
def store_predictions(
    one, index, confidence, prediction, row, rows, present, K: tl.constexpr, WIDTH: tl.constexpr
):
    """(7) 1 / sum_c exp(z_c - max z), and the class that argmax names."""
    p = tl.zeros((row.shape[0], WIDTH), one[0].dtype)
    first = tl.zeros((row.shape[0], WIDTH), tl.int32)
    for k in tl.static_range(K):
        p = put(p, k, 1 / one[k])
        first = put(first, k, tl.where(index[k] < 0, index[k] + LARGE, index[k]))
    store_columns(confidence, p, row, rows, present, K)
    store_columns(prediction, first.to(tl.int64), row, rows, present, K)


@triton.jit
def store_losses(
    losses, valid, present, row, rows, row_losses, mine, field: tl.constexpr,
    FORM: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Losses [ROWS, WIDTH] of every row, or their sums, at `field` of the program's."""
    losses = tl.where(valid[:, None], losses, 0.0)
    if FORM == SCALAR:
        k = tl.arange(0, losses.shape[1])
        tl.store(mine + field + k, tl.sum(losses, 0), mask=k < K)
    else:
        store_columns(row_losses, losses, row, rows, present, K)


@triton.jit
def store_cross_entropies(
    ce, weighted, valid, present, row, rows, row_losses, mine, FORM: tl.constexpr, K: tl.constexpr
):
    if FORM == SCALAR:
        store_losses(ce, valid, present, row, rows, row_losses, mine, 0, FORM, K)
    store_losses(weighted, valid, present, row, rows, row_losses, mine, K, FORM, K)


# One tile of all exits --------------------------------------------------------------------------


@triton.jit
def store_gradient(
    gradient, row, c, inside, valid, class_steps, g, STEP: tl.constexpr, STREAM: tl.constexpr
):
    """Rounded once; nothing on ignored rows, whatever their logits hold."""
    where = at(gradient, row, class_steps, STEP)[:, None] + c[None, :]
    g = tl.where(valid[:, None], g, 0.0).to(gradient.dtype.element_ty)
    tl.store(where, g, mask=inside, cache_modifier=".cs" if STREAM else "")


@triton.jit
def label_gradient(
    x, e, u, c, label, temperature, p_scale, u_scale, DIVERGENT: tl.constexpr,
    TARGET: tl.constexpr, DENSE_TARGET: tl.constexpr,
):  # fmt: skip
    """(6) (sum_c u_c) p - u, scaled; the label's share leaves before rounding."""
    one = tl.exp(x * temperature) if DIVERGENT else e
    g = 0 * one
    if DENSE_TARGET:
        g = -u * u_scale[:, None]
    elif TARGET == LABELS:
        g = tl.where(c[None, :] == label[:, None], -u_scale[:, None], 0.0)
    return tl.fma(one, p_scale[:, None], g)


@triton.jit
def direct_tile(
    x, e, u, c, inside, value, inverse, gap, log_t, pair_factor, p_scale, u_scale, temperature,
    label, valid, gradient, pair_weight, row, rows, class_steps, PAIRS: tl.constexpr,
    PAIR_ROWS: tl.constexpr, DIVERGENCE: tl.constexpr, DIVERGENT: tl.constexpr,
    TARGET: tl.constexpr, DENSE_TARGET: tl.constexpr, K: tl.constexpr, COUNT: tl.constexpr,
    STEP: tl.constexpr, REAL: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """(2), (6) Values of forward KL or soft cross entropy with detached teachers, and the whole
    gradient. Values are a tuple of tiles, summed per lane (WIDE), or columns [ROWS, WIDTH]. From
    the deepest exit to the shallowest, so that sums over deeper exits are running sums: O(K), but
    for a matrix of weights."""
    deepest = x[K - 1]
    # Any finite reference is as good where the deepest exit's class is masked.
    deepest = tl.where(deepest == float("-inf"), 0.0, deepest)
    deepest_q = e[K - 1] * inverse[K - 1][:, None]
    nothing = tl.zeros(deepest_q.shape, REAL)
    mass, moment, excess = nothing, nothing, nothing
    if PAIRS == MUTUAL:
        excess, moment = mutual_sums(
            x, e, inverse, gap, deepest, deepest_q, K, DIVERGENCE == FORWARD_KL
        )
        mass = excess + K * deepest_q
    found = ()
    for i in tl.static_range(K - 1, -1, -1):
        tile, step = nothing, nothing
        q = e[i] * inverse[i][:, None]
        if PAIRS == MUTUAL or (PAIRS == DEEPER and i < K - 1):
            d = (x[i] - deepest) - gap[i][:, None]
            if PAIRS == MUTUAL:
                # The student's own share adds nothing, so one sum serves all.
                step = forward_kl_gradient(q - deepest_q, K, excess)
            else:
                step = forward_kl_gradient(q, teachers_of(PAIRS, K, i), mass)
            if DIVERGENCE == SOFT_CE:
                others = mass - q if PAIRS == MUTUAL else mass
                tile = -weigh(others, x[i] - log_t[i][:, None])
            else:
                tile = forward_kl_value(step, d, mass, moment)
        elif PAIRS == LAST or PAIRS == NEXT:
            if i < K - 1:
                tile, step = one_teacher(
                    x, e, inverse, gap, log_t, i, only_teacher(PAIRS, K, i), DIVERGENCE
                )
        elif PAIRS == DENSE:
            tile, step = any_teachers(
                x, e, inverse, gap, log_t, pair_weight, row, rows, i, PAIR_ROWS, DIVERGENCE,
                COUNT, REAL,
            )  # fmt: skip
        if PAIRS == DEEPER:
            mass += q
            if DIVERGENCE == FORWARD_KL:
                moment += weigh(q, (x[i] - deepest) - gap[i][:, None])
        if WIDE:
            found = found + (value[i] + tile if PAIRS != NONE else value[i],)
        else:
            value = put(value, i, tl.sum(tile, 1))
        if gradient[i] is not None:
            g = label_gradient(
                x[i], e[i], u, c, label, temperature, p_scale[i], u_scale[i], DIVERGENT, TARGET,
                DENSE_TARGET,
            )  # fmt: skip
            if PAIRS != NONE:
                g = tl.fma(step, pair_factor[i][:, None], g)
            store_gradient(gradient[i], row, c, inside, valid, class_steps, g, STEP, WIDE)
    if WIDE:
        value = ()
        for i in tl.static_range(K):
            value = value + (found[K - 1 - i],)
    return value


@triton.jit
def general_values(
    x, e, value, total, inverse, gap, log_t, beta, coefficient, pair_weight, row, rows,
    PAIRS: tl.constexpr, PAIR_ROWS: tl.constexpr, DIVERGENCE: tl.constexpr, DETACH: tl.constexpr,
    K: tl.constexpr, COUNT: tl.constexpr, REAL: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """(2) sum_j w_ij D_ij of any divergence, sum_c dL/dl, and dL/dl itself if it can be held."""
    values, totals, held = (), (), ()
    for k in tl.static_range(K):
        v, h = pairs_of(
            x, e, inverse, gap, log_t, beta, pair_weight, row, rows, coefficient, k, PAIRS,
            PAIR_ROWS, DIVERGENCE, DETACH, K, COUNT, REAL,
        )  # fmt: skip
        values = values + (add(value[k], v, WIDE),)
        totals = totals + (add(total[k], h, WIDE),)
        if not WIDE:
            held = held + (h,)
    return values, totals, held


@triton.jit
def general_gradients(
    x, e, u, c, inside, total, held, inverse, gap, log_t, beta, coefficient, p_scale, u_scale,
    temperature, inverse_t, label, valid, gradient, pair_weight, row, rows, class_steps,
    PAIRS: tl.constexpr, PAIR_ROWS: tl.constexpr, DIVERGENCE: tl.constexpr, DETACH: tl.constexpr,
    TARGET: tl.constexpr, DENSE_TARGET: tl.constexpr, K: tl.constexpr, COUNT: tl.constexpr,
    STEP: tl.constexpr, REAL: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    for k in tl.static_range(K):
        if gradient[k] is not None:
            if WIDE:
                _, h = pairs_of(
                    x, e, inverse, gap, log_t, beta, pair_weight, row, rows, coefficient, k, PAIRS,
                    PAIR_ROWS, DIVERGENCE, DETACH, K, COUNT, REAL,
                )  # fmt: skip
            else:
                h = held[k]
            q = e[k] * inverse[k][:, None]
            g = softmax_jacobian(h, q, total[k][:, None], inverse_t)
            g += label_gradient(
                x[k], e[k], u, c, label, temperature, p_scale[k], u_scale[k], True, TARGET,
                DENSE_TARGET,
            )  # fmt: skip
            store_gradient(gradient[k], row, c, inside, valid, class_steps, g, STEP, WIDE)


@triton.jit
def close_all(totals, K: tl.constexpr, WIDE: tl.constexpr):
    result = ()
    for k in tl.static_range(K):
        result = result + (close(totals[k], WIDE),)
    return result


@triton.jit
def columns_of(
    totals, K: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, REAL: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Sums of K exits, per lane (WIDE) or per row, as one tile [ROWS, WIDTH]."""
    result = tl.zeros((ROWS, WIDTH), REAL)
    for k in tl.static_range(K):
        result = put(result, k, close(totals[k], WIDE))
    return result


@triton.jit
def swept_pair(
    z, strides, m, row, present, classes, inverse_t, inverse, gap, log_t, beta, i: tl.constexpr,
    j: tl.constexpr, DIVERGENCE: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """D_ij of every row by a sweep of its own: all pairs' sums at once would not fit registers."""
    total = tl.zeros((ROWS, BLOCK), REAL)
    for n in range(0, tl.cdiv(classes, BLOCK)):
        c = n * BLOCK + tl.arange(0, BLOCK)
        inside = present[:, None] & (c < classes)[None, :]
        two = load_exits((z[i], z[j]), (strides[i], strides[j]), row, c, inside, 2, STEP, REAL)
        x, e = exponentials(two, (m[i], m[j]), inverse_t, 2)
        v, _, _ = pair_tile(
            x, e, (inverse[i], inverse[j]), (gap[i], gap[j]), (log_t[i], log_t[j]), beta, 0, 1,
            DIVERGENCE,
        )  # fmt: skip
        total += v
    return tl.sum(total, 1)

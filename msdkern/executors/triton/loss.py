# SPDX-License-Identifier: Apache-2.0
"""The kernel of the loss family: values and gradients of a few samples per program.

RESIDENT: a program holds its samples' whole row sets [K, C] in registers; they are read once and
the gradients written once, in this one launch. Otherwise blocks of classes are swept: once for the
normalisers, then from the last block back to the first, whose lines are the likeliest still to be
in a cache, for values and gradients. Divergences whose gradient needs sums over the classes of
its own (anything but forward KL and soft cross entropy with detached teachers) take one sweep more.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .divergences import (
    DEEPER,
    DENSE,
    LAST,
    MUTUAL,
    NEXT,
    NONE,
    any_teachers,
    corrections,
    mutual_sums,
    one_teacher,
    only_teacher,
    pair_tile,
    pairs_of,
    share,
    teachers_of,
)
from .math import (
    FORWARD_KL,
    JSD,
    REVERSE_KL,
    SOFT_CE,
    forward_kl_gradient,
    forward_kl_value,
    positive,
    reciprocal,
    scalar,
    softmax_jacobian,
    weigh,
)
from .rows import AT_ONCE, GROUP, add, at, batch_is_complete, close, column_sums, first_class, load_exits
from .rows import normalisers, start

SCALAR = tl.constexpr(0)
ROW_LOSSES = tl.constexpr(1)
ROW_BACKWARD = tl.constexpr(2)
NO_TARGET = tl.constexpr(0)
LABELS = tl.constexpr(1)
PROBABILITIES = tl.constexpr(2)
# Whether the normalisers of a mean are not needed, counted by every program, or counted before.
COUNT_LATER = tl.constexpr(0)
COUNT_HERE = tl.constexpr(1)
COUNTED = tl.constexpr(2)
LABELS_AT_ONCE = tl.constexpr(1024)
LARGE = tl.constexpr(1 << 30)  # beyond every class


# (3), (4) What the labels say of the batch -------------------------------------------------------


@triton.jit
def count_labels(
    label, class_weight, ignore_index, begin, end, classes, REAL: tl.constexpr
):
    """Valid rows, and the sum of their labels' class weights, over rows begin .. end - 1."""
    valid_rows = tl.zeros((LABELS_AT_ONCE,), REAL)
    weights = tl.zeros((LABELS_AT_ONCE,), REAL)
    for first in range(begin, end, LABELS_AT_ONCE):
        row = first + tl.arange(0, LABELS_AT_ONCE).to(tl.int64)
        y = tl.load(label + row, mask=row < end, other=ignore_index)
        valid = (row < end) & (y != ignore_index)
        valid_rows += valid.to(REAL)
        if class_weight is not None:
            known = valid & (y >= 0) & (y < classes)
            weights += tl.load(class_weight + y, mask=known, other=0)
    rows = tl.sum(valid_rows, 0)
    total = rows
    if class_weight is not None:
        total = tl.sum(weights, 0)
    return rows, total


@triton.jit
def count_kernel(
    label, class_weight, counts, sums, group_sums, tickets, ignore_index, rows, classes,
    SPAN: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """counts = (valid rows, sum of class weights); for batches too long to be counted by all."""
    first = tl.program_id(0).to(tl.int64) * SPAN
    last = tl.minimum(first + SPAN, rows)
    valid, weights = count_labels(label, class_weight, ignore_index, first, last, classes, REAL)
    mine = sums + tl.program_id(0).to(tl.int64) * 2
    tl.store(mine, valid)
    tl.store(mine + 1, weights)
    if batch_is_complete(sums, group_sums, tickets, 2):
        column = tl.arange(0, 2)
        groups = tl.cdiv(tl.num_programs(0), GROUP)
        total = column_sums(group_sums, groups, column, column < 2, 2)
        tl.store(counts + column, total.to(REAL))


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


# (1) Cross entropy ------------------------------------------------------------------------------


@triton.jit
def mass_tile(
    probability, probability_stride, class_weight, row, c, inside, classes, label, on_label,
    smooth, keep, TARGET: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """u: what the cross entropy puts on each class."""
    weight = tl.full(c.shape, 1.0, REAL)
    if class_weight is not None:
        weight = tl.load(class_weight + c, mask=c < classes, other=0)
    if TARGET == PROBABILITIES:
        where = at(probability, row, probability_stride, 1)[:, None] + c[None, :]
        y = tl.load(where, mask=inside, other=0).to(REAL)
        u = (y * keep + smooth) * weight[None, :]
    else:
        u = smooth * weight[None, :] + tl.where(c[None, :] == label[:, None], on_label[:, None], 0)
    return tl.where(inside, u, 0.0)


@triton.jit
def mass_total(
    probability, probability_stride, class_weight, row, present, classes, label, on_label, smooth,
    keep, TARGET: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """sum_c u_c of every row."""
    total = tl.zeros((ROWS, BLOCK), REAL)
    for b in range(0, tl.cdiv(classes, BLOCK)):
        c = b * BLOCK + tl.arange(0, BLOCK)
        inside = present[:, None] & (c < classes)[None, :]
        total += mass_tile(
            probability, probability_stride, class_weight, row, c, inside, classes, label,
            on_label, smooth, keep, TARGET, REAL,
        )  # fmt: skip
    return tl.sum(total, 1)


@triton.jit
def row_weight(
    exit_weight, k: tl.constexpr, row, rows, present, PER_ROW: tl.constexpr, REAL: tl.constexpr
):
    """a_k of every row."""
    if exit_weight is None:
        a = tl.full(row.shape, 1.0, REAL)
    elif PER_ROW:
        a = tl.load(exit_weight + k * rows + row, mask=present, other=0)
    else:
        a = tl.load(exit_weight + k + 0 * row)
    return a


@triton.jit
def store_cross_entropy(
    ce, a, k: tl.constexpr, valid, present, row, rows, row_losses, mine, FORM: tl.constexpr,
    K: tl.constexpr,
):  # fmt: skip
    """At once: what is stored no longer takes registers."""
    ce = tl.where(valid, ce, 0.0)
    if FORM == SCALAR:
        tl.store(mine + k, tl.sum(ce, 0))
        tl.store(mine + K + k, tl.sum(a * ce, 0))
    else:
        tl.store(row_losses + k * rows + row, a * ce, mask=present)


@triton.jit
def store_divergence(
    d, scale, k: tl.constexpr, valid, present, row, rows, row_losses, mine, PAIRS: tl.constexpr,
    FORM: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """(3) s sum_j W_kj D_kj of every row."""
    if FORM != ROW_BACKWARD:
        d = tl.where(valid, d * share(PAIRS, K, k) * scale, 0.0)
        if FORM == SCALAR:
            tl.store(mine + 2 * K + k, tl.sum(d, 0))
        else:
            tl.store(row_losses + k * rows + row, d, mask=present)


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
    g = one * p_scale[:, None]
    if DENSE_TARGET:
        g -= u * u_scale[:, None]
    elif TARGET == LABELS:
        g -= tl.where(c[None, :] == label[:, None], u_scale[:, None], 0.0)
    return g


@triton.jit
def direct_tile(
    x, e, u, c, inside, value, inverse, gap, log_t, pair_factor, p_scale, u_scale, temperature,
    label, valid, gradient, pair_weight, row, rows, class_steps, error, scale, present,
    row_losses, mine, FORM: tl.constexpr,
    PAIRS: tl.constexpr, PAIR_ROWS: tl.constexpr, DIVERGENCE: tl.constexpr,
    DIVERGENT: tl.constexpr, TARGET: tl.constexpr, DENSE_TARGET: tl.constexpr, K: tl.constexpr,
    COUNT: tl.constexpr, STEP: tl.constexpr, REAL: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """(2), (6) Values of forward KL or soft cross entropy with detached teachers, and the whole
    gradient. From the deepest exit to the shallowest, so that sums over deeper exits are running
    sums: O(K), but for a matrix of weights."""
    deepest = x[K - 1]
    # Any finite reference is as good where the deepest exit's class is masked.
    deepest = tl.where(deepest == float("-inf"), 0.0, deepest)
    deepest_q = e[K - 1] * inverse[K - 1][:, None]
    mass = 0 * deepest_q
    moment = 0 * deepest_q
    excess = 0 * deepest_q
    if PAIRS == MUTUAL:
        excess, moment = mutual_sums(
            x, e, inverse, gap, deepest, deepest_q, K, DIVERGENCE == FORWARD_KL
        )
        mass = excess + K * deepest_q
    found = ()
    for i in tl.static_range(K - 1, -1, -1):
        tile = 0 * deepest_q
        step = tile
        q = e[i] * inverse[i][:, None]
        if PAIRS == MUTUAL or PAIRS == DEEPER:
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
            if PAIRS == DEEPER:
                mass += q
                if DIVERGENCE == FORWARD_KL:
                    moment += weigh(q, d)
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
        if WIDE:
            found = found + (value[i] + tile if PAIRS != NONE else value[i],)
        else:
            # At once: what is stored no longer takes registers.
            d = tl.sum(tile, 1) - error[i] if PAIRS != NONE else error[i]
            store_divergence(
                d, scale, i, valid, present, row, rows, row_losses, mine, PAIRS, FORM, K
            )
            found = found + (value[i],)
        if gradient[i] is not None:
            g = label_gradient(
                x[i], e[i], u, c, label, temperature, p_scale[i], u_scale[i], DIVERGENT, TARGET,
                DENSE_TARGET,
            )  # fmt: skip
            if PAIRS != NONE:
                g += step * pair_factor[i][:, None]
            store_gradient(gradient[i], row, c, inside, valid, class_steps, g, STEP, WIDE)
    result = ()
    for i in tl.static_range(K):
        result = result + (found[K - 1 - i],)
    return result


@triton.jit
def general_values(
    x, e, value, total, inverse, gap, log_t, beta, coefficient, pair_weight, row, rows,
    PAIRS: tl.constexpr, PAIR_ROWS: tl.constexpr, DIVERGENCE: tl.constexpr, DETACH: tl.constexpr,
    K: tl.constexpr, COUNT: tl.constexpr, REAL: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """(2) sum_j w_ij D_ij of any divergence, and sum_c dL/dl."""
    values, totals = (), ()
    for k in tl.static_range(K):
        v, h = pairs_of(
            x, e, inverse, gap, log_t, beta, pair_weight, row, rows, coefficient, k, PAIRS,
            PAIR_ROWS, DIVERGENCE, DETACH, K, COUNT, REAL,
        )  # fmt: skip
        values = values + (add(value[k], v, WIDE),)
        totals = totals + (add(total[k], h, WIDE),)
    return values, totals


@triton.jit
def general_gradients(
    x, e, u, c, inside, total, inverse, gap, log_t, beta, coefficient, p_scale, u_scale,
    temperature, inverse_t, label, valid, gradient, pair_weight, row, rows, class_steps,
    PAIRS: tl.constexpr, PAIR_ROWS: tl.constexpr, DIVERGENCE: tl.constexpr, DETACH: tl.constexpr,
    TARGET: tl.constexpr, DENSE_TARGET: tl.constexpr, K: tl.constexpr, COUNT: tl.constexpr,
    STEP: tl.constexpr, REAL: tl.constexpr, STREAM: tl.constexpr,
):  # fmt: skip
    for k in tl.static_range(K):
        if gradient[k] is not None:
            _, h = pairs_of(
                x, e, inverse, gap, log_t, beta, pair_weight, row, rows, coefficient, k, PAIRS,
                PAIR_ROWS, DIVERGENCE, DETACH, K, COUNT, REAL,
            )  # fmt: skip
            q = e[k] * inverse[k][:, None]
            g = softmax_jacobian(h, q, total[k][:, None], inverse_t)
            g += label_gradient(
                x[k], e[k], u, c, label, temperature, p_scale[k], u_scale[k], True, TARGET,
                DENSE_TARGET,
            )  # fmt: skip
            store_gradient(gradient[k], row, c, inside, valid, class_steps, g, STEP, STREAM)


@triton.jit
def dense_values(
    x, u, value, log_one, back, K: tl.constexpr, WIDE: tl.constexpr
):
    """(1) -sum_c u_c log p_c for targets with mass on many classes."""
    result = ()
    for k in tl.static_range(K):
        tile = weigh(u, log_one[k][:, None] - x[k] * back)
        result = result + (add(value[k], tile, WIDE),)
    return result


@triton.jit
def close_all(totals, K: tl.constexpr, WIDE: tl.constexpr):
    result = ()
    for k in tl.static_range(K):
        result = result + (close(totals[k], WIDE),)
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


# The batch --------------------------------------------------------------------------------------
# What a program adds up: [K] cross entropies, [K] weighted ones, [K] divergences, valid rows, the
# sum of their labels' class weights, and the matrix of pairs [K, COUNT] where it is wanted.


@triton.jit
def finish(
    group_sums, loss, cross_entropy, divergence, matrix, normalizer, MEAN: tl.constexpr,
    NORMALIZED: tl.constexpr, MATRIX: tl.constexpr, K: tl.constexpr, COUNT: tl.constexpr,
    WIDTH: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    """(3) The batch's values from the sums of all groups, in float64."""
    real = loss.dtype.element_ty
    groups = tl.cdiv(tl.num_programs(0), GROUP)
    k = tl.arange(0, WIDTH)
    two = tl.arange(0, 2)
    count = column_sums(group_sums, groups, 3 * K + two, two < 2, FIELDS)
    per_row = reciprocal(tl.sum(tl.where(two == 0, count, 0.0), 0))
    per_label = reciprocal(tl.sum(tl.where(two == 1, count, 0.0), 0))
    ce = column_sums(group_sums, groups, k, k < K, FIELDS)
    weighted = column_sums(group_sums, groups, K + k, k < K, FIELDS)
    divergences = column_sums(group_sums, groups, 2 * K + k, k < K, FIELDS)
    tl.store(cross_entropy + k, (per_label * ce).to(real), mask=k < K)
    tl.store(divergence + k, (per_row * divergences).to(real), mask=k < K)
    r_ce, r_row = per_label, per_row
    if NORMALIZED:
        r_ce = 1 / normalizer.to(tl.float64)
        r_row = r_ce
    elif not MEAN:
        r_ce = 1 + 0 * per_label
        r_row = r_ce
    tl.store(loss, (r_ce * tl.sum(weighted, 0) + r_row * tl.sum(divergences, 0)).to(real))
    if MATRIX:
        for first in range(0, K * COUNT, AT_ONCE):
            pair = first + tl.arange(0, AT_ONCE)
            inside = pair < K * COUNT
            d = column_sums(group_sums, groups, 3 * K + 2 + pair, inside, FIELDS)
            tl.store(matrix + pair, (per_row * d).to(real), mask=inside)


@triton.jit
def loss_kernel(
    z, strides, gradient, label, probability, probability_stride, class_weight, exit_weight,
    pair_weight, upstream_ce, upstream_divergence, temperature, pair_scale, normalizer, smoothing,
    beta, loss, cross_entropy, divergence, matrix, prediction, confidence, counts, sums,
    group_sums, tickets, ignore_index, rows, class_steps,
    POINTERS: tl.constexpr, FORM: tl.constexpr, PAIRS: tl.constexpr, DIVERGENCE: tl.constexpr,
    DETACH: tl.constexpr, SQUARED: tl.constexpr, MEAN: tl.constexpr, NORMALIZED: tl.constexpr,
    COUNTING: tl.constexpr, GRADIENT: tl.constexpr, MATRIX: tl.constexpr, TARGET: tl.constexpr,
    SMOOTH: tl.constexpr, EXIT_ROWS: tl.constexpr, PAIR_ROWS: tl.constexpr,
    RESIDENT: tl.constexpr, STEP: tl.constexpr, K: tl.constexpr, COUNT: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    DIVERGENT: tl.constexpr = PAIRS != 0 or MATRIX
    DIRECT: tl.constexpr = PAIRS == 0 or (DETACH and (DIVERGENCE == 0 or DIVERGENCE == 3))
    DENSE_TARGET: tl.constexpr = TARGET == 2 or (TARGET == 1 and SMOOTH)
    FIELDS: tl.constexpr = 3 * K + 2 + (K * COUNT if MATRIX else 0)
    WIDE: tl.constexpr = not RESIDENT
    classes = class_steps * STEP
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    present = row < rows
    t = positive(scalar(temperature, POINTERS & 1, REAL))
    scale = scalar(pair_scale, POINTERS & 2, REAL)
    if SQUARED:
        scale = scale * t * t
    inverse_t = 1 / t if DIVERGENT else tl.full((), 1.0, REAL)
    b = inverse_t
    if DIVERGENCE == JSD:
        b = scalar(beta, POINTERS & 16, REAL)

    # (4) Labels. One out of range makes its row NaN; nothing is read for it.
    valid = present
    y = tl.full((ROWS,), -1, tl.int64)
    poison = tl.zeros((ROWS,), REAL)
    on_label = tl.zeros((ROWS,), REAL)
    if TARGET == LABELS:
        y = tl.load(label + row, mask=present, other=ignore_index)
        valid = present & (y != ignore_index)
        known = valid & (y >= 0) & (y < classes)
        poison = tl.where(valid & (known == 0), float("nan"), 0.0).to(REAL)
        on_label = tl.where(known, 1.0, 0.0).to(REAL)
        if class_weight is not None:
            on_label = tl.load(class_weight + y, mask=known, other=0)
    label_weight = on_label

    # (3) r of the two parts, as far as it is known now.
    r_ce = tl.full((), 1.0, REAL)
    r_row = tl.full((), 1.0, REAL)
    divisor = tl.full((), 1.0, REAL)
    if NORMALIZED:
        divisor = positive(scalar(normalizer, POINTERS & 4, REAL))
        r_ce = 1 / divisor
        r_row = r_ce
    elif COUNTING == COUNT_HERE:
        valid_rows, weights = count_labels(
            label, class_weight, ignore_index, 0, rows, classes, REAL
        )
        r_ce, r_row = reciprocal(weights), reciprocal(valid_rows)
    elif COUNTING == COUNTED:
        r_row, r_ce = reciprocal(tl.load(counts)), reciprocal(tl.load(counts + 1))
    elif MEAN:
        r_ce = r_ce / rows
        r_row = r_ce

    # Softmaxes.
    c = tl.arange(0, BLOCK)
    inside = present[:, None] & (c < classes)[None, :]
    if RESIDENT:
        held = load_exits(z, strides, row, c, inside, COUNT, STEP, REAL)
        x, e, m, s, one, index = held_rows(
            held, c, inverse_t, K, COUNT, DIVERGENT, FORM == SCALAR
        )
    else:
        m, s, one, index = swept_rows(
            z, strides, row, present, classes, inverse_t, K, COUNT, DIVERGENT, FORM == SCALAR,
            STEP, ROWS, BLOCK, REAL,
        )  # fmt: skip
    inverse, excess, gap = normalisers(s, COUNT, K - 1)
    if FORM == SCALAR:
        for k in tl.static_range(K):
            place = k * rows + row
            tl.store(confidence + place, 1 / one[k], mask=present)
            first = tl.where(index[k] < 0, index[k] + LARGE, index[k])
            tl.store(prediction + place, first.to(tl.int64), mask=present)

    # (1) Cross entropies, and the scales of their gradients.
    smooth = tl.zeros((), REAL)
    keep = tl.full((), 1.0, REAL)
    total_mass = on_label
    u = tl.zeros((ROWS, BLOCK), REAL)
    if DENSE_TARGET:
        if SMOOTH:
            spread = scalar(smoothing, POINTERS & 8, REAL)
            smooth, keep = spread / classes, 1 - spread
        on_label = on_label * keep
        if RESIDENT:
            u = mass_tile(
                probability, probability_stride, class_weight, row, c, inside, classes, y,
                on_label, smooth, keep, TARGET, REAL,
            )  # fmt: skip
            total_mass = tl.sum(u, 1)
        else:
            total_mass = mass_total(
                probability, probability_stride, class_weight, row, present, classes, y, on_label,
                smooth, keep, TARGET, ROWS, BLOCK, REAL,
            )  # fmt: skip
    mine = sums + tl.program_id(0).to(tl.int64) * FIELDS if FORM == SCALAR else sums
    log_t, log_one, p_scale, u_scale, coefficient, pair_factor = (), (), (), (), (), ()
    for r in tl.static_range(COUNT):
        log_t = log_t + (tl.log(s[r]),)
    for k in tl.static_range(K):
        log_one = log_one + (tl.log(one[k]),)
        up_ce, up_divergence = r_ce + 0 * poison, r_row + 0 * on_label
        if FORM == ROW_BACKWARD:
            up_ce = tl.load(upstream_ce + k * rows + row, mask=present, other=0)
            up_divergence = tl.load(upstream_divergence + k * rows + row, mask=present, other=0)
        a = row_weight(exit_weight, k, row, rows, present, EXIT_ROWS, REAL)
        if FORM != ROW_BACKWARD and not DENSE_TARGET:
            ce = poison
            if TARGET == LABELS:
                z_y = tl.load(at(z[k], row, strides[k], STEP) + y, mask=known, other=0).to(REAL)
                ce = on_label * (log_one[k] - (z_y - m[k])) + poison
            store_cross_entropy(ce, a, k, valid, present, row, rows, cross_entropy, mine, FORM, K)
        a = a * up_ce if TARGET != NO_TARGET else 0 * a
        p_scale = p_scale + (a * total_mass / one[k] + poison,)
        u_scale = u_scale + ((a if DENSE_TARGET else a * on_label),)
        coefficient = coefficient + (up_divergence * scale * share(PAIRS, K, k),)
        pair_factor = pair_factor + (coefficient[k] * inverse_t,)

    # (2), (6) Divergences and gradients.
    error = corrections(
        excess, pair_weight, row, rows, PAIRS, PAIR_ROWS, DIVERGENCE, K, COUNT, REAL
    )
    value, total, dense_ce = (), (), ()
    for k in tl.static_range(K):
        value = value + (start(ROWS, BLOCK, REAL, WIDE),)
        total = total + (start(ROWS, BLOCK, REAL, WIDE),)
        dense_ce = dense_ce + (start(ROWS, BLOCK, REAL, WIDE),)
    back = t if DIVERGENT else 1.0  # from x at the temperature to x at 1
    blocks = tl.cdiv(classes, BLOCK)
    if RESIDENT:
        if DENSE_TARGET:
            dense_ce = dense_values(x, u, dense_ce, log_one, back, K, WIDE)
        if DIRECT:
            value = direct_tile(
                x, e, u, c, inside, value, inverse, gap, log_t, pair_factor, p_scale, u_scale, t,
                y, valid, gradient, pair_weight, row, rows, class_steps, error, scale, present,
                divergence, mine, FORM, PAIRS, PAIR_ROWS, DIVERGENCE, DIVERGENT, TARGET, DENSE_TARGET, K, COUNT, STEP, REAL, WIDE,
            )  # fmt: skip
        else:
            value, total = general_values(
                x, e, value, total, inverse, gap, log_t, b, coefficient, pair_weight, row, rows,
                PAIRS, PAIR_ROWS, DIVERGENCE, DETACH, K, COUNT, REAL, WIDE,
            )  # fmt: skip
            general_gradients(
                x, e, u, c, inside, total, inverse, gap, log_t, b, coefficient, p_scale, u_scale,
                t, inverse_t, y, valid, gradient, pair_weight, row, rows, class_steps, PAIRS,
                PAIR_ROWS, DIVERGENCE, DETACH, TARGET, DENSE_TARGET, K, COUNT, STEP, REAL, WIDE,
            )  # fmt: skip
    else:
        if not DIRECT or PAIRS != NONE or GRADIENT or DENSE_TARGET:
            for n in range(0, blocks):
                c = (blocks - 1 - n) * BLOCK + tl.arange(0, BLOCK)
                inside = present[:, None] & (c < classes)[None, :]
                tile = load_exits(z, strides, row, c, inside, COUNT, STEP, REAL)
                x, e = exponentials(tile, m, inverse_t, COUNT)
                if DENSE_TARGET:
                    u = mass_tile(
                        probability, probability_stride, class_weight, row, c, inside, classes, y,
                        on_label, smooth, keep, TARGET, REAL,
                    )  # fmt: skip
                    dense_ce = dense_values(x, u, dense_ce, log_one, back, K, WIDE)
                if DIRECT:
                    value = direct_tile(
                        x, e, u, c, inside, value, inverse, gap, log_t, pair_factor, p_scale,
                        u_scale, t, y, valid, gradient, pair_weight, row, rows, class_steps, error,
                        scale, present, divergence, mine, FORM, PAIRS, PAIR_ROWS, DIVERGENCE, DIVERGENT, TARGET, DENSE_TARGET, K, COUNT, STEP,
                        REAL, WIDE,
                    )  # fmt: skip
                else:
                    value, total = general_values(
                        x, e, value, total, inverse, gap, log_t, b, coefficient, pair_weight, row,
                        rows, PAIRS, PAIR_ROWS, DIVERGENCE, DETACH, K, COUNT, REAL, WIDE,
                    )  # fmt: skip
        if GRADIENT and not DIRECT:
            total = close_all(total, K, WIDE)
            for n in range(0, blocks):
                c = n * BLOCK + tl.arange(0, BLOCK)
                inside = present[:, None] & (c < classes)[None, :]
                tile = load_exits(z, strides, row, c, inside, COUNT, STEP, REAL)
                x, e = exponentials(tile, m, inverse_t, COUNT)
                if DENSE_TARGET:
                    u = mass_tile(
                        probability, probability_stride, class_weight, row, c, inside, classes, y,
                        on_label, smooth, keep, TARGET, REAL,
                    )  # fmt: skip
                general_gradients(
                    x, e, u, c, inside, total, inverse, gap, log_t, b, coefficient, p_scale,
                    u_scale, t, inverse_t, y, valid, gradient, pair_weight, row, rows, class_steps,
                    PAIRS, PAIR_ROWS, DIVERGENCE, DETACH, TARGET, DENSE_TARGET, K, COUNT, STEP,
                    REAL, WIDE,
                )  # fmt: skip
    if FORM == ROW_BACKWARD:
        return

    # (3) Sums over rows.
    for k in tl.static_range(K):
        if DENSE_TARGET:
            a = row_weight(exit_weight, k, row, rows, present, EXIT_ROWS, REAL)
            ce = close(dense_ce[k], WIDE) + poison
            store_cross_entropy(ce, a, k, valid, present, row, rows, cross_entropy, mine, FORM, K)
        if not (DIRECT and RESIDENT):
            d = close(value[k], WIDE) - error[k]
            store_divergence(
                d, scale, k, valid, present, row, rows, divergence, mine, PAIRS, FORM, K
            )
    if FORM == SCALAR:
        counted = tl.where(valid, 1.0, 0.0)
        tl.store(mine + 3 * K, tl.sum(counted, 0))
        if TARGET == LABELS and class_weight is not None:
            counted = tl.where(valid, label_weight, 0.0)
        tl.store(mine + 3 * K + 1, tl.sum(counted, 0))
        if MATRIX:
            for i in tl.static_range(K):
                for j in tl.static_range(COUNT):
                    if RESIDENT:
                        v, _, _ = pair_tile(x, e, inverse, gap, log_t, b, i, j, DIVERGENCE)
                        d = tl.sum(v, 1)
                    else:
                        d = swept_pair(
                            z, strides, m, row, present, classes, inverse_t, inverse, gap, log_t,
                            b, i, j, DIVERGENCE, STEP, ROWS, BLOCK, REAL,
                        )  # fmt: skip
                    if DIVERGENCE == FORWARD_KL:
                        d -= excess[i] - excess[j]
                    elif DIVERGENCE == REVERSE_KL:
                        d += excess[i] - excess[j]
                    field = 3 * K + 2 + i * COUNT + j
                    tl.store(mine + field, tl.sum(tl.where(valid, d, 0.0), 0))
        if batch_is_complete(sums, group_sums, tickets, FIELDS):
            finish(
                group_sums, loss, cross_entropy, divergence, matrix, divisor, MEAN, NORMALIZED,
                MATRIX, K, COUNT, WIDTH, FIELDS,
            )  # fmt: skip

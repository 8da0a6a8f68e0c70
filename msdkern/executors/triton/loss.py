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

from .cross_entropy import (
    LABELS,
    NO_TARGET,
    dense_values,
    mass_tile,
    mass_total,
    mean_shares,
    read_labels,
    row_weight,
)
from .divergences import NONE, pair_tile, share
from .math import JSD, positive, reciprocal, scalar
from .rows import (
    AT_ONCE,
    GROUP,
    at,
    batch_is_complete,
    close,
    column_sums,
    in_exit,
    load_exits,
    normalisers,
    start,
)
from .sweeps import (
    LARGE,
    ROW_BACKWARD,
    SCALAR,
    close_all,
    direct_tile,
    exponentials,
    general_gradients,
    general_values,
    held_rows,
    store_cross_entropy,
    store_divergence,
    swept_pair,
    swept_rows,
)

# The batch --------------------------------------------------------------------------------------
# What a program adds up: [K] cross entropies, [K] weighted ones, [K] divergences, valid rows, the
# sum of their labels' class weights, and the matrix of pairs [K, COUNT] where it is wanted.


@triton.jit
def finish(
    group_sums, loss, cross_entropy, divergence, matrix, given, MEAN: tl.constexpr,
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
        r_ce = given.to(tl.float64)
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

    valid, y, known, poison, on_label = read_labels(
        label, class_weight, ignore_index, row, present, classes, TARGET, REAL
    )
    label_weight = on_label
    r_ce, r_row = mean_shares(
        label, class_weight, ignore_index, normalizer, counts, rows, classes, POINTERS, MEAN,
        NORMALIZED, COUNTING, REAL,
    )  # fmt: skip

    # Softmaxes.
    c = tl.arange(0, BLOCK)
    inside = present[:, None] & (c < classes)[None, :]
    if RESIDENT:
        held = load_exits(z, strides, row, c, inside, COUNT, STEP, REAL)
        x, e, m, s, one, index = held_rows(held, c, inverse_t, K, COUNT, DIVERGENT, FORM == SCALAR)
    else:
        m, s, one, index = swept_rows(
            z, strides, row, present, classes, inverse_t, K, COUNT, DIVERGENT, FORM == SCALAR,
            STEP, ROWS, BLOCK, REAL,
        )  # fmt: skip
    inverse, gap = normalisers(s, COUNT, K - 1)
    if FORM == SCALAR:
        for k in tl.static_range(K):
            place = in_exit(k, rows, row)
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
            up_ce = tl.load(upstream_ce + in_exit(k, rows, row), mask=present, other=0)
            up_divergence = tl.load(
                upstream_divergence + in_exit(k, rows, row), mask=present, other=0
            )
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
    value, total, dense_ce = (), (), ()
    for k in tl.static_range(K):
        value = value + (start(ROWS, BLOCK, REAL, WIDE),)
        total = total + (start(ROWS, BLOCK, REAL, WIDE),)
        dense_ce = dense_ce + (start(ROWS, BLOCK, REAL, WIDE),)
    back = t if DIVERGENT else 1.0  # from x at the temperature to x at 1
    blocks = tl.cdiv(classes, BLOCK)
    steps = 1 if RESIDENT else blocks  # the compiler leaves no loop of the one
    if RESIDENT or not DIRECT or PAIRS != NONE or GRADIENT or DENSE_TARGET:
        for n in range(0, steps):
            if WIDE:
                c = (blocks - 1 - n) * BLOCK + tl.arange(0, BLOCK)
                inside = present[:, None] & (c < classes)[None, :]
                tile = load_exits(z, strides, row, c, inside, COUNT, STEP, REAL)
                x, e = exponentials(tile, m, inverse_t, COUNT)
                if DENSE_TARGET:
                    u = mass_tile(
                        probability, probability_stride, class_weight, row, c, inside, classes, y,
                        on_label, smooth, keep, TARGET, REAL,
                    )  # fmt: skip
            if DENSE_TARGET:
                dense_ce = dense_values(x, u, dense_ce, log_one, back, K, WIDE)
            if DIRECT:
                value = direct_tile(
                    x, e, u, c, inside, value, inverse, gap, log_t, pair_factor, p_scale, u_scale,
                    t, y, valid, gradient, pair_weight, row, rows, class_steps, scale, present,
                    divergence, mine, FORM, PAIRS, PAIR_ROWS, DIVERGENCE, DIVERGENT, TARGET,
                    DENSE_TARGET, K, COUNT, STEP, REAL, WIDE,
                )  # fmt: skip
            else:
                value, total = general_values(
                    x, e, value, total, inverse, gap, log_t, b, coefficient, pair_weight, row,
                    rows, PAIRS, PAIR_ROWS, DIVERGENCE, DETACH, K, COUNT, REAL, WIDE,
                )  # fmt: skip
    if GRADIENT and not DIRECT:
        total = close_all(total, K, WIDE)
        for n in range(0, steps):
            if WIDE:
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
                x, e, u, c, inside, total, inverse, gap, log_t, b, coefficient, p_scale, u_scale,
                t, inverse_t, y, valid, gradient, pair_weight, row, rows, class_steps, PAIRS,
                PAIR_ROWS, DIVERGENCE, DETACH, TARGET, DENSE_TARGET, K, COUNT, STEP, REAL, WIDE,
            )  # fmt: skip

    # (3) Sums over rows.
    for k in tl.static_range(K):
        if DENSE_TARGET and FORM != ROW_BACKWARD:
            a = row_weight(exit_weight, k, row, rows, present, EXIT_ROWS, REAL)
            ce = close(dense_ce[k], WIDE) + poison
            store_cross_entropy(ce, a, k, valid, present, row, rows, cross_entropy, mine, FORM, K)
        if not (DIRECT and RESIDENT):
            store_divergence(
                close(value[k], WIDE), scale, k, valid, present, row, rows, divergence, mine, PAIRS,
                FORM, K,
            )  # fmt: skip
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
                    field = 3 * K + 2 + i * COUNT + j
                    tl.store(mine + field, tl.sum(tl.where(valid, d, 0.0), 0))
        if batch_is_complete(sums, group_sums, tickets, FIELDS):
            finish(
                group_sums, loss, cross_entropy, divergence, matrix, r_row, MEAN, NORMALIZED,
                MATRIX, K, COUNT, WIDTH, FIELDS,
            )  # fmt: skip

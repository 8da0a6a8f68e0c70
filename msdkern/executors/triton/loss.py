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

from .batch import finish, store_counts
from .cross_entropy import (
    LABELS,
    NO_TARGET,
    dense_values,
    mass_tile,
    mass_total,
    mean_shares,
    read_labels,
    row_weight,
    smoothing_of,
)
from .divergences import NONE, pair_tile, share, shares
from .math import JSD, log_of_sum, scalar, scales
from .rows import at, batch_is_complete, close, in_exit, load_exits, normalisers, put, start
from .sweeps import (
    ROW_BACKWARD,
    SCALAR,
    close_all,
    columns_of,
    direct_tile,
    general_gradients,
    general_values,
    held_rows,
    power_of_two,
    store_cross_entropies,
    store_losses,
    store_predictions,
    swept_pair,
    swept_rows,
    swept_tile,
)


@triton.jit
def loss_kernel(
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
    DIVERGENT: tl.constexpr = PAIRS != 0 or MATRIX
    DIRECT: tl.constexpr = PAIRS == 0 or (DETACH and (DIVERGENCE == 0 or DIVERGENCE == 3))
    DENSE_TARGET: tl.constexpr = TARGET == 2 or (TARGET == 1 and SMOOTH)
    FIELDS: tl.constexpr = 3 * K + 2 + (K * COUNT if MATRIX else 0)
    DIRECT_HELD: tl.constexpr = DIRECT and RESIDENT
    WIDE: tl.constexpr = not RESIDENT
    classes = class_steps * STEP
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    present = row < rows
    t, scale, inverse_t = scales(temperature, pair_scale, POINTERS, SQUARED, DIVERGENT, REAL)
    b = inverse_t
    if DIVERGENCE == JSD:
        b = scalar(beta, POINTERS & 16, REAL)
    valid, y, known, poison, label_weight = read_labels(
        label, class_weight, ignore_index, row, present, classes, TARGET, REAL
    )
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
        store_predictions(one, index, confidence, prediction, row, rows, present, K, WIDTH)

    # (1) Cross entropies, and the scales of their gradients.
    smooth, keep = smoothing_of(smoothing, classes, POINTERS, SMOOTH, REAL)
    on_label = label_weight * keep if DENSE_TARGET else label_weight
    mass = (probability, probability_stride, class_weight, y, on_label, smooth, keep)
    total_mass = on_label
    u = tl.zeros((ROWS, BLOCK), REAL)
    if DENSE_TARGET and RESIDENT:
        u = mass_tile(mass, row, c, inside, classes, TARGET, REAL)
        total_mass = tl.sum(u, 1)
    elif DENSE_TARGET:
        total_mass = mass_total(mass, row, present, classes, TARGET, ROWS, BLOCK, REAL)
    mine = sums + tl.program_id(0).to(tl.int64) * FIELDS if FORM == SCALAR else sums
    ce, weighted = tl.zeros((ROWS, WIDTH), REAL), tl.zeros((ROWS, WIDTH), REAL)
    log_t, log_one, p_scale, u_scale, coefficient, pair_factor = (), (), (), (), (), ()
    for r in tl.static_range(COUNT):
        log_t = log_t + (log_of_sum(s[r]),)
    for k in tl.static_range(K):
        log_one = log_one + (log_of_sum(one[k]),)
        up_ce, up_divergence = tl.broadcast_to(r_ce, row.shape), tl.broadcast_to(r_row, row.shape)
        if FORM == ROW_BACKWARD:
            up_ce = tl.load(upstream_ce + in_exit(k, rows, row), mask=present, other=0)
            up_divergence = tl.load(
                upstream_divergence + in_exit(k, rows, row), mask=present, other=0
            )
        a = row_weight(exit_weight, k, row, rows, present, EXIT_ROWS, REAL)
        if not DENSE_TARGET:
            of_row = poison
            if TARGET == LABELS:
                z_y = tl.load(at(z[k], row, strides[k], STEP) + y, mask=known, other=0).to(REAL)
                of_row = on_label * (log_one[k] - (z_y - m[k])) + poison
            ce, weighted = put(ce, k, of_row), put(weighted, k, a * of_row)
        a = a * up_ce if TARGET != NO_TARGET else 0 * a
        p_scale = p_scale + (a * total_mass / one[k] + poison,)
        u_scale = u_scale + ((a if DENSE_TARGET else a * on_label),)
        coefficient = coefficient + (up_divergence * scale * share(PAIRS, K, k),)
        pair_factor = pair_factor + (coefficient[k] * inverse_t,)
    if FORM != ROW_BACKWARD and not DENSE_TARGET:
        store_cross_entropies(ce, weighted, valid, present, row, rows, cross_entropy, mine, FORM, K)

    if FORM == SCALAR:
        WEIGHTED: tl.constexpr = TARGET == LABELS and class_weight is not None
        store_counts(mine + 3 * K, valid, label_weight, WEIGHTED)

    # (2), (6) Divergences and gradients.
    value, total, dense_ce, h = (), (), (), ()
    for k in tl.static_range(K):
        value = value + (start(ROWS, BLOCK, REAL, WIDE),)
        total = total + (start(ROWS, BLOCK, REAL, WIDE),)
        dense_ce = dense_ce + (start(ROWS, BLOCK, REAL, WIDE),)
        if not WIDE and not DIRECT:
            h = h + (tl.zeros((ROWS, BLOCK), REAL),)
    if DIRECT_HELD:
        value = tl.zeros((ROWS, WIDTH), REAL)
    back = t if DIVERGENT else 1.0  # from x at the temperature to x at 1
    blocks = tl.cdiv(classes, BLOCK)
    steps = 1 if RESIDENT else blocks  # the compiler leaves no loop of the one
    if RESIDENT or not DIRECT or PAIRS != NONE or GRADIENT or DENSE_TARGET:
        for n in range(0, steps):
            if WIDE:
                c, inside, x, e, u = swept_tile(
                    z, strides, m, mass, blocks - 1 - n, row, present, classes, inverse_t, TARGET,
                    DENSE_TARGET, COUNT, STEP, ROWS, BLOCK, REAL,
                )  # fmt: skip
            if DENSE_TARGET:
                dense_ce = dense_values(x, u, dense_ce, log_one, back, K, WIDE)
            if DIRECT:
                value = direct_tile(
                    x, e, u, c, inside, value, inverse, gap, log_t, pair_factor, p_scale, u_scale,
                    t, y, valid, gradient, pair_weight, row, rows, class_steps, PAIRS, PAIR_ROWS,
                    DIVERGENCE, DIVERGENT, TARGET, DENSE_TARGET, K, COUNT, STEP, REAL, WIDE,
                )  # fmt: skip
            else:
                value, total, h = general_values(
                    x, e, value, total, inverse, gap, log_t, b, coefficient, pair_weight, row,
                    rows, PAIRS, PAIR_ROWS, DIVERGENCE, DETACH, K, COUNT, REAL, WIDE,
                )  # fmt: skip
    if GRADIENT and not DIRECT:
        total = close_all(total, K, WIDE)
        for n in range(0, steps):
            if WIDE:
                c, inside, x, e, u = swept_tile(
                    z, strides, m, mass, n, row, present, classes, inverse_t, TARGET,
                    DENSE_TARGET, COUNT, STEP, ROWS, BLOCK, REAL,
                )  # fmt: skip
            general_gradients(
                x, e, u, c, inside, total, h, inverse, gap, log_t, b, coefficient, p_scale,
                u_scale, t, inverse_t, y, valid, gradient, pair_weight, row, rows, class_steps,
                PAIRS, PAIR_ROWS, DIVERGENCE, DETACH, TARGET, DENSE_TARGET, K, COUNT, STEP, REAL,
                WIDE,
            )  # fmt: skip

    # (3) Sums over rows.
    if FORM != ROW_BACKWARD:
        if DENSE_TARGET:
            for k in tl.static_range(K):
                a = row_weight(exit_weight, k, row, rows, present, EXIT_ROWS, REAL)
                of_row = close(dense_ce[k], WIDE) + poison
                ce, weighted = put(ce, k, of_row), put(weighted, k, a * of_row)
            store_cross_entropies(
                ce, weighted, valid, present, row, rows, cross_entropy, mine, FORM, K
            )
        d = value if DIRECT_HELD else columns_of(value, K, ROWS, WIDTH, REAL, WIDE)
        d = d * shares(tl.arange(0, WIDTH), PAIRS, K, REAL)[None, :] * scale
        store_losses(d, valid, present, row, rows, divergence, mine, 2 * K, FORM, K)
    if FORM == SCALAR:
        if MATRIX:
            for i in tl.static_range(K):
                d = tl.zeros((ROWS, power_of_two(COUNT)), REAL)
                for j in tl.static_range(COUNT):
                    if RESIDENT:
                        v, _, _ = pair_tile(x, e, inverse, gap, log_t, b, i, j, DIVERGENCE)
                        d = put(d, j, tl.sum(v, 1))
                    else:
                        v = swept_pair(
                            z, strides, m, row, present, classes, inverse_t, inverse, gap, log_t,
                            b, i, j, DIVERGENCE, STEP, ROWS, BLOCK, REAL,
                        )  # fmt: skip
                        d = put(d, j, v)
                store_losses(
                    d, valid, present, row, rows, sums, mine, 3 * K + 2 + i * COUNT, FORM, COUNT
                )
        if batch_is_complete(sums, group_sums, tickets, FIELDS):
            finish(
                group_sums, loss, cross_entropy, divergence, matrix, r_row, MEAN, NORMALIZED,
                MATRIX, K, COUNT, WIDTH, FIELDS,
            )  # fmt: skip

# SPDX-License-Identifier: Apache-2.0
"""Softmax of all exits with its backward, exit statistics, and the scaling of gradients.

Exits do not see each other here: axis 0 of the grid is rows, axis 1 is exits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .math import positive, scalar, softmax_jacobian, weigh
from .rows import at, exit_of, in_exit, load_tile

LARGE = tl.constexpr(1 << 30)


@triton.jit
def store_tile(pointer, c, present, classes, y, STREAM: tl.constexpr):
    inside = present[:, None] & (c < classes)[None, :]
    y = y.to(pointer.dtype.element_ty)
    where = pointer[:, None] + c[None, :]
    tl.store(where, y, mask=inside, cache_modifier=".cs" if STREAM else "")


@triton.jit
def softmax_sums(
    z, present, classes, inverse_t, ROWS: tl.constexpr, BLOCK: tl.constexpr, REAL: tl.constexpr
):
    """Maximum and sum of exp((z - m) / T) of every row, in one sweep."""
    m = tl.full((ROWS,), float("-inf"), REAL)
    s = tl.zeros((ROWS, BLOCK), REAL)
    for b in range(0, tl.cdiv(classes, BLOCK)):
        c = b * BLOCK + tl.arange(0, BLOCK)
        tile = load_tile(z, c, present, classes, float("-inf"), REAL)
        top = tl.maximum(m, tl.max(tile, 1))
        safe = tl.where(top == float("-inf"), 0.0, top)
        shrink = tl.exp((m - safe) * inverse_t)
        s = s * shrink[:, None] + tl.exp((tile - safe[:, None]) * inverse_t)
        m = top
    return m, tl.sum(s, 1)


@triton.jit
def softmax_of(tile, m, s, log_s, inverse_t, LOG: tl.constexpr):
    x = (tile - m[:, None]) * inverse_t
    if LOG:
        y = x - log_s[:, None]
    else:
        y = tl.exp(x) * (1 / s)[:, None]
    return y


@triton.jit
def softmax_kernel(
    z, strides, y, temperature, rows, class_steps, POINTERS: tl.constexpr, LOG: tl.constexpr,
    RESIDENT: tl.constexpr, STEP: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """softmax(z / T) or its logarithm."""
    k = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    present = row < rows
    classes = class_steps * STEP
    inverse_t = 1 / positive(scalar(temperature, POINTERS & 1, REAL))
    source = at(exit_of(z, k, K), row, exit_of(strides, k, K), STEP)
    target = at(exit_of(y, k, K), row, class_steps, STEP)
    if RESIDENT:
        c = tl.arange(0, BLOCK)
        tile = load_tile(source, c, present, classes, float("-inf"), REAL)
        m = tl.max(tile, 1)
        s = tl.sum(tl.exp((tile - m[:, None]) * inverse_t), 1)
        result = softmax_of(tile, m, s, tl.log(s), inverse_t, LOG)
        store_tile(target, c, present, classes, result, False)
    else:
        m, s = softmax_sums(source, present, classes, inverse_t, ROWS, BLOCK, REAL)
        log_s = tl.log(s)
        blocks = tl.cdiv(classes, BLOCK)
        for n in range(0, blocks):
            c = (blocks - 1 - n) * BLOCK + tl.arange(0, BLOCK)
            tile = load_tile(source, c, present, classes, float("-inf"), REAL)
            result = softmax_of(tile, m, s, log_s, inverse_t, LOG)
            store_tile(target, c, present, classes, result, True)


@triton.jit
def backward_of(g, y, total, inverse_t, LOG: tl.constexpr):
    """log_softmax: (g - p sum_c g) / T. softmax: p (g - sum_c g p) / T."""
    if LOG:
        found = softmax_jacobian(g, tl.exp(y), total[:, None], inverse_t)
    else:
        found = y * (g - total[:, None]) * inverse_t
    return found


@triton.jit
def softmax_backward_kernel(
    y, y_strides, g, g_strides, result, temperature, rows, class_steps, POINTERS: tl.constexpr,
    LOG: tl.constexpr, RESIDENT: tl.constexpr, STEP: tl.constexpr, K: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    k = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    present = row < rows
    classes = class_steps * STEP
    inverse_t = 1 / positive(scalar(temperature, POINTERS & 1, REAL))
    value = at(exit_of(y, k, K), row, exit_of(y_strides, k, K), STEP)
    upstream = at(exit_of(g, k, K), row, exit_of(g_strides, k, K), STEP)
    target = at(exit_of(result, k, K), row, class_steps, STEP)
    if RESIDENT:
        c = tl.arange(0, BLOCK)
        y_c = load_tile(value, c, present, classes, 0.0, REAL)
        g_c = load_tile(upstream, c, present, classes, 0.0, REAL)
        total = tl.sum(g_c if LOG else g_c * y_c, 1)
        store_tile(target, c, present, classes, backward_of(g_c, y_c, total, inverse_t, LOG), False)
    else:
        sums = tl.zeros((ROWS, BLOCK), REAL)
        blocks = tl.cdiv(classes, BLOCK)
        for n in range(0, blocks):
            c = n * BLOCK + tl.arange(0, BLOCK)
            g_c = load_tile(upstream, c, present, classes, 0.0, REAL)
            if not LOG:
                g_c = g_c * load_tile(value, c, present, classes, 0.0, REAL)
            sums += g_c
        total = tl.sum(sums, 1)
        for n in range(0, blocks):
            c = (blocks - 1 - n) * BLOCK + tl.arange(0, BLOCK)
            y_c = load_tile(value, c, present, classes, 0.0, REAL)
            g_c = load_tile(upstream, c, present, classes, 0.0, REAL)
            found = backward_of(g_c, y_c, total, inverse_t, LOG)
            store_tile(target, c, present, classes, found, True)


@triton.jit
def statistics_kernel(
    z, strides, lse, confidence, prediction, margin, entropy, sum_squares, rows, class_steps,
    STEP: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    REAL: tl.constexpr,
):  # fmt: skip
    """(7) in one sweep. Sums and the two largest logits are kept per lane."""
    k = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    present = row < rows
    classes = class_steps * STEP
    source = at(exit_of(z, k, K), row, exit_of(strides, k, K), STEP)
    m = tl.full((ROWS,), float("-inf"), REAL)
    s = tl.zeros((ROWS, BLOCK), REAL)
    squares = tl.zeros((ROWS, BLOCK), REAL)
    weighted = tl.zeros((ROWS, BLOCK), REAL)
    best = tl.full((ROWS, BLOCK), float("-inf"), REAL)
    second = tl.full((ROWS, BLOCK), float("-inf"), REAL)
    index = tl.zeros((ROWS, BLOCK), tl.int32) + tl.arange(0, BLOCK)[None, :]
    nan_at = tl.full((ROWS, BLOCK), LARGE, tl.int32)
    for b in range(0, tl.cdiv(classes, BLOCK)):
        c = b * BLOCK + tl.arange(0, BLOCK)
        tile = load_tile(source, c, present, classes, float("-inf"), REAL)
        nan_at = tl.minimum(nan_at, tl.where(tile != tile, c[None, :], LARGE))
        index = tl.where(tile > best, c[None, :], index)
        second = tl.maximum(second, tl.minimum(best, tile))
        best = tl.maximum(best, tile)
        top = tl.maximum(m, tl.max(tile, 1))
        safe = tl.where(top == float("-inf"), 0.0, top)  # all -inf so far: no NaN yet
        shrink = tl.exp(m - safe)[:, None]
        moved = tl.where(m == float("-inf"), 0.0, m - safe)[:, None]
        x = tile - safe[:, None]
        e = tl.exp(x)
        weighted = shrink * (weighted + moved * s) + weigh(e, x)
        squares = squares * (shrink * shrink) + e * e
        s = s * shrink + e
        m = top
    total = tl.sum(s, 1)
    total = tl.where(m == float("-inf"), float("nan"), total)
    inverse = 1 / total
    log_total = tl.log(total)
    argmax = tl.min(tl.where(best == m[:, None], index, LARGE), 1)
    others = tl.where(index == argmax[:, None], second, best)
    runner_up = tl.max(others, 1)
    first_nan = tl.min(nan_at, 1)
    argmax = tl.where(first_nan < LARGE, first_nan, tl.where(argmax < classes, argmax, 0))
    # Where the largest logit is infinite or NaN, it is the sum.
    top = tl.where(first_nan < LARGE, float("nan"), m)
    finite = (top - top) == 0
    place = in_exit(k, rows, row)
    tl.store(lse + place, tl.where(finite, m + log_total, top), mask=present)
    tl.store(confidence + place, inverse, mask=present)
    tl.store(prediction + place, argmax.to(tl.int64), mask=present)
    tl.store(margin + place, inverse * (1 - tl.exp(runner_up - m)), mask=present)
    tl.store(entropy + place, log_total - tl.sum(weighted, 1) * inverse, mask=present)
    tl.store(sum_squares + place, tl.sum(squares, 1) * (inverse * inverse), mask=present)


@triton.jit
def scale_kernel(
    data, factor, size, POINTER: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
    REAL: tl.constexpr,
):  # fmt: skip
    """data *= factor for all tensors, in place; ends at once when the factor is 1."""
    f = scalar(factor, POINTER, REAL)
    pointer = exit_of(data, tl.program_id(1), K)
    if f != 1:
        step = tl.num_programs(0).to(tl.int64) * BLOCK
        for first in range(tl.program_id(0).to(tl.int64) * BLOCK, size, step):
            i = first + tl.arange(0, BLOCK)
            x = tl.load(pointer + i, mask=i < size).to(REAL)
            tl.store(pointer + i, (x * f).to(pointer.dtype.element_ty), mask=i < size)

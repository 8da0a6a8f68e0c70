# SPDX-License-Identifier: Apache-2.0
"""The gates: what a measure says of a row, who leaves, and the order of those that stay.

A program takes a few rows. RESIDENT: their classes are held in registers; otherwise they are swept
once. Lanes keep their own maximum, then, and sums relative to it, so that nothing crosses threads
before the end.
"""

from __future__ import annotations

import sys

import triton
import triton.language as tl

from .math import positive, weigh
from .rows import at, exit_of, first_class, load_tile

# In the order of msdkern.reference.MEASURES.
CONFIDENCE = tl.constexpr(0)
MARGIN = tl.constexpr(1)
ENTROPY = tl.constexpr(2)
NORMALIZED_ENTROPY = tl.constexpr(3)
MAX_LOGIT = tl.constexpr(4)
PATIENCE = tl.constexpr(5)
GIVEN = tl.constexpr(6)

# How a number per exit is passed: K values, or in the device's memory one for all or K.
VALUES = tl.constexpr(0)
ONE_IN_MEMORY = tl.constexpr(1)
ALL_IN_MEMORY = tl.constexpr(2)

LARGE = tl.constexpr(1 << 30)  # beyond every class
ARRIVED = tl.constexpr(1 << 16)  # beyond every number of rows that share a counter
AT_ONCE = tl.constexpr(1024)  # rows that are put in order, or counters that are added, in one step


@triton.constexpr_function
def is_entropy(measure):
    return measure in (2, 3)


@triton.constexpr_function
def needs_sums(measure):
    return measure < 4


@triton.constexpr_function
def lowest(real):
    """A shift that is finite also where all classes so far are masked by -inf."""
    return -sys.float_info.max if real == tl.float64 else -(2.0 - 2.0**-23) * 2.0**127


@triton.jit
def number_of(values, k, HOW: tl.constexpr, K: tl.constexpr, REAL: tl.constexpr):
    """A temperature or threshold of exit k."""
    if HOW == VALUES:
        value = tl.full((), exit_of(values, k, K), REAL)
    elif HOW == ONE_IN_MEMORY:
        value = tl.load(values).to(REAL)
    else:
        value = tl.load(values + k).to(REAL)
    return value


# Readings of rows -------------------------------------------------------------------------------
# argmax, whether there is a NaN, the largest logit m and the largest but one; and with
# x = (z - m) / T, the sums of e^x and of x e^x.


@triton.jit
def held_rows(
    source, reading, classes, inverse_t, MEASURE: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    c = tl.arange(0, BLOCK)
    tile = load_tile(source, c, reading, classes, float("-inf"), REAL)
    m = tl.max(tile, 1)
    first = first_class(tile, c, m, LARGE)
    nan = first < 0
    argmax = tl.where(nan, first + LARGE, first)
    runner_up, total, weighted = m, m, m
    if MEASURE == MARGIN:
        others = tl.where(c[None, :] == argmax[:, None], float("-inf"), tile)
        runner_up = tl.max(others, 1)
    if needs_sums(MEASURE):
        x = (tile - m[:, None]) * inverse_t
        e = tl.exp(x)
        total = tl.sum(e, 1)
        if is_entropy(MEASURE):
            weighted = tl.sum(weigh(e, x), 1)
    return argmax, nan, m, runner_up, total, weighted


@triton.jit
def first_nan(
    source, reading, classes, ROWS: tl.constexpr, BLOCK: tl.constexpr, REAL: tl.constexpr
):
    """The first class that holds NaN, or LARGE."""
    first = tl.full((ROWS,), LARGE, tl.int32)
    for b in range(0, tl.cdiv(classes, BLOCK)):
        c = b * BLOCK + tl.arange(0, BLOCK)
        tile = load_tile(source, c, reading, classes, 0.0, REAL)
        first = tl.minimum(first, tl.min(tl.where(tile != tile, c[None, :], LARGE), 1))
    return first


@triton.jit
def swept_rows(
    source, reading, classes, inverse_t, MEASURE: tl.constexpr, TILES: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    best = tl.full((ROWS, BLOCK), float("-inf"), REAL)
    second = best
    total = tl.zeros((ROWS, BLOCK), REAL)
    weighted = tl.zeros((ROWS, BLOCK), REAL)
    where = tl.zeros((ROWS, BLOCK), tl.int32)  # in which tile a lane found its largest
    anyone = tl.max(reading.to(tl.int32), 0)
    for b in range(0, anyone * tl.cdiv(classes, TILES * BLOCK)):
        tiles = ()
        for i in tl.static_range(TILES):
            c = (b * TILES + i) * BLOCK + tl.arange(0, BLOCK)
            tiles = tiles + (load_tile(source, c, reading, classes, float("-inf"), REAL),)
        before = tl.maximum(best, lowest(REAL))
        for i in tl.static_range(TILES):
            where = tl.where(tiles[i] > best, b * TILES + i, where)
            if MEASURE == MARGIN:
                second = tl.maximum(second, tl.minimum(best, tiles[i]))
            best = tl.maximum(best, tiles[i])
        if needs_sums(MEASURE):
            top = tl.maximum(best, lowest(REAL))
            moved = (before - top) * inverse_t
            shrink = tl.exp(moved)
            if is_entropy(MEASURE):
                weighted = weigh(shrink, weighted + moved * total)
            total = total * shrink
            for i in tl.static_range(TILES):
                x = (tiles[i] - top) * inverse_t
                e = tl.exp(x)
                total += e
                if is_entropy(MEASURE):
                    weighted += weigh(e, x)
        else:
            for i in tl.static_range(TILES):
                total = tl.where(tiles[i] == tiles[i], total, tiles[i])
    return closed(
        best, second, total, weighted, where, source, reading, classes, inverse_t, MEASURE, ROWS,
        BLOCK, REAL,
    )  # fmt: skip


@triton.jit
def closed(
    best, second, total, weighted, where, source, reading, classes, inverse_t,
    MEASURE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """The lanes' findings as those of their rows."""
    m = tl.max(best, 1)
    c = where * BLOCK + tl.arange(0, BLOCK)[None, :]
    argmax = tl.min(tl.where(best == m[:, None], c, LARGE), 1)
    runner_up = tl.max(tl.where(c == argmax[:, None], second, best), 1)
    argmax = tl.where(argmax < classes, argmax, 0)
    if needs_sums(MEASURE):
        x = (tl.maximum(best, lowest(REAL)) - m[:, None]) * inverse_t
        e = tl.exp(x)
        if is_entropy(MEASURE):
            weighted = weigh(e, weighted + x * total)
        total = total * e
    total_of_row = tl.sum(total, 1)
    # A row without a softmax: one more look tells whether that is because of a NaN.
    odd = reading & (total_of_row != total_of_row)
    nan = odd
    if tl.max(odd.to(tl.int32), 0) > 0:
        first = first_nan(source, odd, classes, ROWS, BLOCK, REAL)
        nan = first < LARGE
        argmax = tl.where(nan, first, argmax)
    return argmax, nan, m, runner_up, total_of_row, tl.sum(weighted, 1)


@triton.jit
def measured(
    source, reading, classes, t, MEASURE: tl.constexpr, RESIDENT: tl.constexpr,
    TILES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """(10) Predictions, and the scores that follow from one exit's logits. Only rows that are
    `reading` are read."""
    inverse_t = 1 / positive(t)
    if RESIDENT:
        argmax, nan, m, runner_up, total, weighted = held_rows(
            source, reading, classes, inverse_t, MEASURE, ROWS, BLOCK, REAL
        )
    else:
        argmax, nan, m, runner_up, total, weighted = swept_rows(
            source, reading, classes, inverse_t, MEASURE, TILES, ROWS, BLOCK, REAL
        )
    score = tl.where(nan, float("nan"), m) * inverse_t
    if MEASURE == CONFIDENCE:
        score = 1 / total
    elif MEASURE == MARGIN:
        score = (1 / total) * (1 - tl.exp((runner_up - m) * inverse_t))
    elif is_entropy(MEASURE):
        score = tl.log(total) - weighted * (1 / total)
        if MEASURE == NORMALIZED_ENTROPY and classes > 1:
            score = score / tl.log(tl.full((), classes, REAL))
    return argmax.to(tl.int64), score


@triton.jit
def fires(score, threshold, MEASURE: tl.constexpr):
    """(10) A NaN score stays."""
    if is_entropy(MEASURE):
        leaves = score <= threshold
    else:
        leaves = score >= threshold
    return leaves


# Gates ------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["rows"])
def exit_gate_kernel(
    z, strides, threshold, temperature, given, exit_index, prediction, score, rows, class_steps,
    THRESHOLD: tl.constexpr, TEMPERATURE: tl.constexpr, MEASURE: tl.constexpr,
    RESIDENT: tl.constexpr, STEP: tl.constexpr, K: tl.constexpr, TILES: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """(10) The first exit that fires answers a row; later exits of that row are not read."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    going = row < rows
    index = tl.zeros((ROWS,), tl.int64)
    answer = tl.full((ROWS,), -1, tl.int64)
    found = tl.zeros((ROWS,), REAL)
    k = tl.zeros((), tl.int32)
    place = row  # of the exit's numbers in [K, N]
    while (k < K) & (tl.max(going.to(tl.int32), 0) > 0):
        source = at(exit_of(z, k, K), row, exit_of(strides, k, K), STEP)
        t = number_of(temperature, k, TEMPERATURE, K, REAL)
        p, s = measured(
            source, going, class_steps * STEP, t, MEASURE, RESIDENT, TILES, ROWS, BLOCK, REAL
        )
        if MEASURE == PATIENCE:
            s = tl.where(p == answer, found + 1, 0.0)
        elif MEASURE == GIVEN:
            s = tl.load(given + place, mask=going, other=0)
        index = tl.where(going, k, index)
        answer = tl.where(going, p, answer)
        found = tl.where(going, s, found)
        limit = number_of(threshold, k, THRESHOLD, K, REAL)
        going = going & (fires(s, limit, MEASURE) == 0)
        k += 1
        place += rows
    tl.store(exit_index + row, index, mask=row < rows)
    tl.store(prediction + row, answer, mask=row < rows)
    tl.store(score + row, found, mask=row < rows)


@triton.jit
def put_in_order(stays, stay, first, last, before, count):
    """(11) Rows first .. last - 1, with `before` rows that stay ahead of them and `count` in all:
    those that stay by their number among those, the others behind all that stay."""
    for begin in range(first, last, AT_ONCE):
        row = begin + tl.arange(0, AT_ONCE).to(tl.int64)
        # Written by other programs: past the first-level cache.
        remains = tl.load(stays + row, mask=row < last, other=0, cache_modifier=".cg").to(tl.int32)
        ahead = before + tl.cumsum(remains, 0) - remains
        place = tl.where(remains != 0, ahead, count + row - ahead)
        tl.store(stay + place, row, mask=row < last)
        before += tl.sum(remains, 0)


@triton.jit(do_not_specialize=["rows"])
def gate_step_kernel(
    z, stride, threshold, temperature, given, previous, streak, live, prediction, score, stays,
    stay, count, counters, rows, class_steps, THRESHOLD: tl.constexpr, TEMPERATURE: tl.constexpr,
    MEASURE: tl.constexpr, ALONE: tl.constexpr, SPAN: tl.constexpr, RESIDENT: tl.constexpr,
    STEP: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    REAL: tl.constexpr,
):  # fmt: skip
    """(11) Answers, flags of the rows that stay, and how many of each span of rows do.

    A counter holds the number of programs that have added to it, times ARRIVED, and their rows:
    integers, whose order does not matter. Where one span holds all rows (ALONE), the program that
    arrives last puts them in order and leaves the counter at 0.
    """
    first = tl.program_id(0).to(tl.int64) * ROWS
    row = first + tl.arange(0, ROWS)
    present = row < rows
    alive = present
    if live is not None:
        alive = present & (row < tl.load(live))
    t = number_of(temperature, 0, TEMPERATURE, 1, REAL)
    p, s = measured(
        at(z[0], row, stride[0], STEP), alive, class_steps * STEP, t, MEASURE, RESIDENT, TILES,
        ROWS, BLOCK, REAL,
    )  # fmt: skip
    if MEASURE == PATIENCE:
        s = tl.zeros((ROWS,), REAL)
        if previous is not None:
            same = p == tl.load(previous + row, mask=alive, other=-1)
            s = tl.where(same, tl.load(streak + row, mask=alive, other=0) + 1, 0.0)
    elif MEASURE == GIVEN:
        s = tl.load(given + row, mask=alive, other=0)
    limit = number_of(threshold, 0, THRESHOLD, 1, REAL)
    remains = (alive & (fires(s, limit, MEASURE) == 0)).to(tl.int32)
    tl.store(prediction + row, tl.where(alive, p, -1), mask=present)
    tl.store(score + row, tl.where(alive, s, float("nan")), mask=present)
    tl.store(stays + row, remains.to(tl.int8), mask=present)
    mine = ARRIVED + tl.sum(remains, 0)
    tl.debug_barrier()  # what every thread has written comes before the counter
    total = mine + tl.atomic_add(counters + first // SPAN, mine)
    if ALONE and total // ARRIVED == tl.num_programs(0):
        tl.atomic_xchg(counters, 0)
        kept = (total % ARRIVED).to(tl.int64)
        put_in_order(stays, stay, 0, rows, tl.zeros((), tl.int64), kept)
        tl.store(count, kept)


@triton.jit(do_not_specialize=["rows"])
def order_kernel(stays, stay, count, counters, rows, SPAN: tl.constexpr):
    """(11) The order of the rows of one span, from the counters of all."""
    mine = tl.program_id(0)
    before = tl.zeros((AT_ONCE,), tl.int64)
    kept = tl.zeros((AT_ONCE,), tl.int64)
    for begin in range(0, tl.num_programs(0), AT_ONCE):
        span = begin + tl.arange(0, AT_ONCE)
        counter = tl.load(counters + span, mask=span < tl.num_programs(0), other=0)
        rows_of = (counter % ARRIVED).to(tl.int64)
        kept += rows_of
        before += tl.where(span < mine, rows_of, 0)
    kept_rows = tl.sum(kept, 0)
    first = mine.to(tl.int64) * SPAN
    last = tl.minimum(first + SPAN, rows)
    put_in_order(stays, stay, first, last, tl.sum(before, 0), kept_rows)
    if mine == 0:
        tl.store(count, kept_rows)

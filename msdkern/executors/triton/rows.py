# SPDX-License-Identifier: Apache-2.0
"""Tiles of rows: loading, softmax statistics, and sums over the whole batch.

A tile is [ROWS, BLOCK]. Offsets between rows are 64-bit. Strides and the number of classes come in
units of STEP, a power of two that divides them all: so the compiler knows how far rows are
aligned, whatever their length, and loads whole vectors.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .math import log_ratio

GROUP = tl.constexpr(64)  # programs, or groups of them, whose sums are added by one program
AT_ONCE = tl.constexpr(16)  # of them, and columns of sums, that are added in one step


@triton.jit
def at(pointer, row, stride, STEP: tl.constexpr):
    """Pointers to the first class of each row."""
    return pointer + row * stride * STEP  # 64 bits from the first product on, as `row` has


@triton.jit
def in_exit(k, rows, row):
    """Places of exit k's rows in [K, N], in 64 bits."""
    return tl.full((), rows, tl.int64) * k + row


@triton.jit
def put(tile, k, x):
    """x as column k of a tile [ROWS, WIDTH]. What there is of every exit and row is added up over
    the rows, or stored, in one such tile: exit by exit, every sum would meet all warps anew."""
    column = tl.arange(0, tile.shape[1])
    return tl.where((column == k)[None, :], x[:, None], tile)


@triton.jit
def store_columns(pointer, tile, row, rows, present, K: tl.constexpr):
    """[ROWS, WIDTH] to [K, N]."""
    k = tl.arange(0, tile.shape[1])
    inside = present[:, None] & (k < K)[None, :]
    tl.store(pointer + in_exit(k[None, :], rows, row[:, None]), tile, mask=inside)


@triton.jit
def load_exits(
    z, strides, row, c, inside, COUNT: tl.constexpr, STEP: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """One tile of every exit, -inf outside."""
    tiles = ()
    for r in tl.static_range(COUNT):
        where = at(z[r], row, strides[r], STEP)[:, None] + c[None, :]
        tiles = tiles + (tl.load(where, mask=inside, other=float("-inf")).to(REAL),)
    return tiles


@triton.jit
def exit_of(values, k, COUNT: tl.constexpr):
    """values[k] for an exit known only at run time."""
    chosen = values[0]
    for i in tl.static_range(1, COUNT):
        chosen = tl.where(k == i, values[i], chosen)
    return chosen


@triton.jit
def load_tile(pointer, c, present, classes, fill: tl.constexpr, REAL: tl.constexpr):
    inside = present[:, None] & (c < classes)[None, :]
    return tl.load(pointer[:, None] + c[None, :], mask=inside, other=fill).to(REAL)


@triton.jit
def first_class(z, c, target, LARGE: tl.constexpr):
    """The lowest class with the value `target`, or the first NaN: as torch.argmax."""
    hit = tl.where(z == target[:, None], c[None, :], LARGE)
    return tl.min(tl.where(z != z, c[None, :] - LARGE, hit), 1)


@triton.jit
def add(total, tile, WIDE: tl.constexpr):
    """Adds a tile to a sum over classes, kept per lane (WIDE) or per row."""
    if WIDE:
        total = total + tile
    else:
        total = total + tl.sum(tile, 1)
    return total


@triton.jit
def close(total, WIDE: tl.constexpr):
    if WIDE:
        total = tl.sum(total, 1)
    return total


@triton.jit
def start(ROWS: tl.constexpr, BLOCK: tl.constexpr, REAL: tl.constexpr, WIDE: tl.constexpr):
    if WIDE:
        total = tl.zeros((ROWS, BLOCK), REAL)
    else:
        total = tl.zeros((ROWS,), REAL)
    return total


@triton.jit
def last_of(ticket, count):
    """Whether this is the last of `count` programs to arrive; it leaves the ticket at 0."""
    tl.debug_barrier()  # what every thread has written comes before the ticket
    last = tl.atomic_add(ticket, 1) == count - 1
    if last:
        tl.atomic_xchg(ticket, 0)
    return last


@triton.jit
def column_sums(sums, count, column, inside, FIELDS: tl.constexpr):
    """Sums of `count` rows of [.., FIELDS], for the given columns, in order and in float64."""
    total = tl.zeros(column.shape, tl.float64)
    for first in range(0, count, AT_ONCE):
        row = first + tl.arange(0, AT_ONCE)
        where = sums + row.to(tl.int64)[:, None] * FIELDS + column[None, :]
        mask = (row < count)[:, None] & inside[None, :]
        # Written by other programs: past the first-level cache.
        total += tl.sum(tl.load(where, mask=mask, other=0, cache_modifier=".cg").to(tl.float64), 0)
    return total


@triton.jit
def batch_is_complete(sums, group_sums, tickets, FIELDS: tl.constexpr):
    """Adds this program's row of `sums` to the batch: True in the one program that comes last, for
    which `group_sums` then holds cdiv(programs, GROUP) rows.

    Two levels of GROUP. Who adds is decided by integer tickets, in which order by the index: the
    result does not depend on timing.
    """
    programs = tl.num_programs(0)
    group = tl.program_id(0) // GROUP
    first = group * GROUP
    groups = tl.cdiv(programs, GROUP)
    complete = False
    if last_of(tickets + 1 + group, tl.minimum(GROUP, programs - first)):
        for begin in range(0, FIELDS, AT_ONCE):
            column = begin + tl.arange(0, AT_ONCE)
            inside = column < FIELDS
            mine = sums + first.to(tl.int64) * FIELDS
            total = column_sums(mine, tl.minimum(GROUP, programs - first), column, inside, FIELDS)
            where = group_sums + group.to(tl.int64) * FIELDS + column
            tl.store(where, total, mask=inside)
        complete = last_of(tickets, groups)
    return complete


@triton.jit
def normalisers(s, COUNT: tl.constexpr, REFERENCE: tl.constexpr):
    """From the sums of exponentials: 1 / s, and by how much l = x - log s of each exit is less
    than that of the reference exit for the same x.

    log s is taken from 1 / s as it was rounded. Then l is exactly log q of the q = e (1 / s) that
    is used, and a KL with its (b - a), which is of second order in what q_i and q_j differ by,
    does not inherit the rounding of the normalisers as an error of first order.
    """
    inverse = ()
    gap = ()
    for r in tl.static_range(COUNT):
        inverse = inverse + (1 / s[r],)
    for r in tl.static_range(COUNT):
        gap = gap + (gap_to(inverse[REFERENCE], inverse[r]),)
    return inverse, gap


@triton.jit
def gap_to(reference, inverse):
    """log(reference / inverse). Any reference serves exits that do not learn from it, where it has
    no softmax."""
    return log_ratio(tl.where(reference == reference, reference, 1.0), inverse)

# SPDX-License-Identifier: Apache-2.0
"""Labels, normalisers of a mean, and the cross entropies; numbers as in msdkern/reference.py."""

from __future__ import annotations

import triton
import triton.language as tl

from .math import reciprocal, scalar, weigh
from .rows import GROUP, add, at, batch_is_complete, column_sums, in_exit

NO_TARGET = tl.constexpr(0)
LABELS = tl.constexpr(1)
PROBABILITIES = tl.constexpr(2)
# Whether the normalisers of a mean are not needed, counted by every program, or counted before.
COUNT_LATER = tl.constexpr(0)
COUNT_HERE = tl.constexpr(1)
COUNTED = tl.constexpr(2)
# What stands for a label out of range, and for that of a row which does not count.
UNKNOWN = tl.constexpr(-1)
IGNORED = tl.constexpr(-2)
LABELS_AT_ONCE = tl.constexpr(1024)


# (3), (4) What the labels say of the batch -------------------------------------------------------


@triton.jit
def share_of(count):
    """(3) r = 1 / count for a given normalizer, and 0 where nothing was counted. NaN for what is
    no count: the value is on the device, so nothing can raise."""
    share = 1 / tl.where(count > 0, count, 1)
    share = tl.where(count == 0, 0.0, share)
    return tl.where((count >= 0) & (count < float("inf")), share, float("nan"))


@triton.jit
def count_labels(label, class_weight, ignore_index, begin, end, classes, REAL: tl.constexpr):
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


@triton.jit
def mean_shares(
    label, class_weight, ignore_index, normalizer, counts, rows, classes, POINTERS: tl.constexpr,
    MEAN: tl.constexpr, NORMALIZED: tl.constexpr, COUNTING: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """(3) r of the cross entropies and of the divergences, as far as it is known before the end."""
    r_ce = tl.full((), 1.0, REAL)
    r_row = tl.full((), 1.0, REAL)
    if NORMALIZED:
        r_ce = share_of(scalar(normalizer, POINTERS & 4, REAL))
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
    return r_ce, r_row


@triton.jit
def read_labels(
    label, class_weight, ignore_index, row, present, classes, TARGET: tl.constexpr,
    REAL: tl.constexpr,
):  # fmt: skip
    """(4) Which rows count, their labels, which of these are known, NaN where one is out of range,
    for which nothing is read, and the class weight of the label."""
    valid = present
    known = present
    y = tl.full(row.shape, UNKNOWN, tl.int32)
    poison = tl.zeros(row.shape, REAL)
    on_label = tl.zeros(row.shape, REAL)
    if TARGET == LABELS:
        given = tl.load(label + row, mask=present, other=ignore_index)
        counts = present & (given != ignore_index)
        inside = counts & (given >= 0) & (given < classes)
        # One number of 32 bits says it all, so that nothing wider is kept to the end.
        y = tl.where(inside, given.to(tl.int32), tl.where(counts, UNKNOWN, IGNORED))
        valid = y != IGNORED
        known = y >= 0
        poison = tl.where(valid & (known == 0), float("nan"), 0.0).to(REAL)
        on_label = tl.where(known, 1.0, 0.0).to(REAL)
        if class_weight is not None:
            on_label = tl.load(class_weight + y, mask=known, other=0)
    return valid, y, known, poison, on_label


@triton.jit
def smoothing_of(
    smoothing, classes, POINTERS: tl.constexpr, SMOOTH: tl.constexpr, REAL: tl.constexpr
):
    """(1) What label smoothing puts on every class, and what it leaves where it was."""
    smooth = tl.zeros((), REAL)
    keep = tl.full((), 1.0, REAL)
    if SMOOTH:
        spread = scalar(smoothing, POINTERS & 8, REAL)
        smooth, keep = spread / classes, 1 - spread
    return smooth, keep


# (1) Cross entropy ------------------------------------------------------------------------------


@triton.jit
def mass_tile(mass, row, c, inside, classes, TARGET: tl.constexpr, REAL: tl.constexpr):
    """u: what the cross entropy puts on each class. `mass` is all that says where: probabilities
    and their stride, class weights, labels, the mass on a label, on every class, and what is left
    of a probability."""
    probability, probability_stride, class_weight, label, on_label, smooth, keep = mass
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
    mass, row, present, classes, TARGET: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    REAL: tl.constexpr,
):  # fmt: skip
    """sum_c u_c of every row."""
    total = tl.zeros((ROWS, BLOCK), REAL)
    for b in range(0, tl.cdiv(classes, BLOCK)):
        c = b * BLOCK + tl.arange(0, BLOCK)
        inside = present[:, None] & (c < classes)[None, :]
        total += mass_tile(mass, row, c, inside, classes, TARGET, REAL)
    return tl.sum(total, 1)


@triton.jit
def row_weight(
    exit_weight, k: tl.constexpr, row, rows, present, PER_ROW: tl.constexpr, REAL: tl.constexpr
):
    """a_k of every row."""
    if exit_weight is None:
        a = tl.full(row.shape, 1.0, REAL)
    elif PER_ROW:
        a = tl.load(exit_weight + in_exit(k, rows, row), mask=present, other=0)
    else:
        a = tl.load(exit_weight + k + 0 * row)
    return a


@triton.jit
def dense_values(x, u, value, log_one, back, K: tl.constexpr, WIDE: tl.constexpr):
    """(1) -sum_c u_c log p_c for targets with mass on many classes."""
    result = ()
    for k in tl.static_range(K):
        tile = weigh(u, log_one[k][:, None] - x[k] * back)
        result = result + (add(value[k], tile, WIDE),)
    return result

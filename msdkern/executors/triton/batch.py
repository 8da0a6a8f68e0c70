# SPDX-License-Identifier: Apache-2.0
"""What the programs of a loss add up, and the batch's values from it."""

from __future__ import annotations

import triton
import triton.language as tl

from .math import reciprocal
from .rows import AT_ONCE, GROUP, column_sums, put

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
def store_counts(place, valid, label_weight, WEIGHTED: tl.constexpr):
    """Valid rows, and the sum of their labels' class weights."""
    rows = tl.where(valid, 1.0, 0.0).to(label_weight.dtype)
    weights = tl.where(valid, label_weight, 0.0) if WEIGHTED else rows
    both = put(put(tl.zeros((valid.shape[0], 2), rows.dtype), 0, rows), 1, weights)
    tl.store(place + tl.arange(0, 2), tl.sum(both, 0))

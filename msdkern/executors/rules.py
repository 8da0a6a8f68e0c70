# SPDX-License-Identifier: Apache-2.0
"""What values of tensors must be, in one sentence each. Every check reads its tensor: an executor
asks only where reading it needs no synchronisation, or where one was asked for."""

from __future__ import annotations

import math

from torch import Tensor


def positive(op: str, value: Tensor, name: str) -> None:
    if not all(0 < v < math.inf for v in value.view(-1).tolist()):
        raise ValueError(f"{op}: {name} must be positive and finite; got {value.tolist()}")


def not_negative(op: str, value: Tensor, name: str) -> None:
    if not 0 <= value.item() < math.inf:
        raise ValueError(f"{op}: {name} must be finite and not negative; got {value.item()}")


def labels(op: str, label: Tensor, classes: int, skip: int) -> None:
    wrong = ((label < 0) | (label >= classes)) & (label != skip)
    if wrong.any():
        rule = f"labels must be in [0, {classes}) or ignore_index = {skip}"
        raise ValueError(f"{op}: {rule}; got {label[wrong][0].item()}")


def threshold(op: str, value: Tensor) -> None:
    if value.isnan().any():
        raise ValueError(f"{op}: threshold must not be NaN; got {value.tolist()}")


def rows_exist(op: str, index: Tensor, count: Tensor | None, rows: int, limit: int) -> None:
    """The rows that are used: of ``rows``, or the first ``count`` of them."""
    used = index[: rows if count is None else int(count)]
    wrong = (used < 0) | (used >= limit)
    if wrong.any():
        raise ValueError(f"{op}: rows must be in [0, {limit}); got {used[wrong][0].item()}")

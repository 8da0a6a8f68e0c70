# SPDX-License-Identifier: Apache-2.0
"""Rows of many tensors: `compact_rows` gathers those that stay, `scatter_rows` puts them back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from msdkern import executors, reference
from msdkern.ops import checks, library

Rows = TypeVar("Rows", Tensor, Sequence[Tensor])


def compact_rows(x: Rows, stay: Tensor, count: int | Tensor) -> Rows:
    """(12) y[i] = x[stay[i]] for i < count: the hidden states of the rows that go on.

    Args:
        x: a tensor, or a sequence of tensors that share their first axis N; any dtype, any further
            axes. Channels-last images stay channels last.
        stay: int64, the rows to keep, first ones first (`GateStep.stay`).
        count: how many. A number makes y that long. A 0-d int64 tensor is not read on the host: y
            keeps the length of ``stay``, and its rows past the count are zero.

    Returns:
        A tensor, or a tuple of tensors, never a view. No gradient passes.

    Raises: ValueError, TypeError with one sentence. Rows that do not exist are found on the CPU; on
    a GPU, executor `cuda` gathers zeros for them (`msdkern.executors.cuda.check_indices` tells).
    """
    op = "compact_rows"
    tensors = _tensors(op, "x", x)
    _index(op, "stay", stay, tensors[0])
    capacity, tensor = _split(op, count, stay)
    executor = executors.select(op, stay.device.type)
    found = executors.call("compact_rows", tensors, stay, tensor, capacity, executor)
    return found[0] if isinstance(x, Tensor) else tuple(found)


def scatter_rows(out: Rows, values: Rows, index: Tensor, count: int | Tensor | None = None) -> Rows:
    """(12) out[index[i]] = values[i] for i < count, in place: answers go back to their rows.

    The inverse of `compact_rows`: ``scatter_rows(x, compact_rows(x, stay, n), stay, n)`` is x.

    Args:
        out: a tensor, or a sequence of tensors that share their first axis.
        values: as many, each with the dtype and the row shape of its ``out``.
        index: int64, at least as long as the values; no row twice among the first ``count``.
        count: a number, a 0-d int64 tensor that is not read on the host, or None for all values.

    Returns: ``out``. Raises: ValueError, TypeError with one sentence.
    """
    op = "scatter_rows"
    targets, sources = _tensors(op, "out", out), _tensors(op, "values", values)
    _index(op, "index", index, targets[0])
    _alike(op, targets, sources)
    if count is not None:
        capacity, tensor = _split(op, count, sources[0])
        sources = [v[:capacity] for v in sources]
    else:
        tensor = None
    if index.shape[0] < sources[0].shape[0]:
        rule = f"index must have at least {sources[0].shape[0]} entries"
        checks.fail(op, rule, index)
    executor = executors.select(op, index.device.type)
    torch.ops.msdkern.scatter_rows.default(targets, sources, index, tensor, executor)
    return out


def _tensors(op: str, name: str, x: Any) -> list[Tensor]:
    tensors = [x] if isinstance(x, Tensor) else x
    if not isinstance(tensors, (list, tuple)) or not tensors:
        checks.fail(op, f"{name} must be a tensor or a sequence of tensors", x, TypeError)
    for t in tensors:
        checks.plain(op, name, t)
        if t.dim() == 0 or t.shape[0] != tensors[0].shape[0] or t.device != tensors[0].device:
            rule = f"tensors of {name} must share their first axis and their device"
            checks.fail(op, rule, f"{checks.describe(tensors[0])} and {checks.describe(t)}")
        if t.requires_grad and torch.is_grad_enabled():
            checks.fail(op, f"{name} must not require a gradient (use torch.no_grad())", t)
    return [t.detach() if t.requires_grad else t for t in tensors]


def _index(op: str, name: str, index: object, like: Tensor) -> None:
    if not isinstance(index, Tensor) or index.dim() != 1 or index.dtype != torch.int64:
        checks.fail(op, f"{name} must be int64 [N]", index)
    if index.device != like.device:
        checks.fail(op, f"{name} must be on the device of the rows ({like.device})", index.device)


def _split(op: str, count: Any, rows: Tensor) -> tuple[int, Tensor | None]:
    """How many rows there is room for, and the count where only the device knows it."""
    longest = rows.shape[0]
    if isinstance(count, Tensor):
        if count.dim() != 0 or count.dtype != torch.int64:
            checks.fail(op, "count must be a number or a 0-d int64 tensor", count)
        if count.device != rows.device:
            rule = f"count must be on the device of the rows ({rows.device})"
            checks.fail(op, rule, str(count.device))
        return longest, count
    if isinstance(count, bool) or not isinstance(count, (int, torch.SymInt)):
        checks.fail(op, "count must be a number or a 0-d int64 tensor", count, TypeError)
    if isinstance(count, int) and not 0 <= count <= longest:
        checks.fail(op, f"count must be between 0 and {longest}", count)
    return count, None  # type: ignore[return-value]


def _alike(op: str, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    if len(targets) != len(sources):
        checks.fail(op, f"values must be {len(targets)} tensors", len(sources))
    for t, v in zip(targets, sources, strict=True):
        if t.shape[1:] != v.shape[1:] or t.dtype != v.dtype or t.device != v.device:
            rule = "values must have the dtype, device and row shape of out"
            checks.fail(op, rule, f"{checks.describe(t)} and {checks.describe(v)}")


def _fake_compact(
    x: Sequence[Tensor], stay: Tensor, count: Tensor | None, capacity: int, executor: str
) -> list[Tensor]:
    shapes = [(capacity, *t.shape[1:]) for t in x]
    return [
        torch.empty(s, dtype=t.dtype, device=t.device, memory_format=reference.row_format(t))
        for s, t in zip(shapes, x, strict=True)
    ]


library.register("compact_rows", _fake_compact)
library.register("scatter_rows", lambda out, values, index, count, executor: None)

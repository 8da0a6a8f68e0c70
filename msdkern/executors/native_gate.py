# SPDX-License-Identifier: Apache-2.0
"""The gate family of executor `cpu`: gates, and the rows that stay."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from msdkern import reference
from msdkern.executors.tables import DTYPE_CODES, address, load_module, real, table, unit_columns

MEASURE_CODES = {
    "confidence": 0, "margin": 1, "entropy": 2, "normalized_entropy": 3, "max_logit": 4,
    "patience": 5, "score": 6,
}  # fmt: skip
TENSORS = 32  # that one copy of rows takes


@functools.cache
def _kernels() -> Any:
    return load_module("_cpu")[0]


def _gate(
    op: str,
    step: bool,
    logits: Sequence[Tensor],
    threshold: Tensor,
    measure: str,
    temperature: Tensor,
    score: Tensor | None,
    previous: tuple[Tensor | None, Tensor | None],
    live: Tensor | None,
    outputs: Sequence[Tensor],
) -> None:
    logits = [unit_columns(z) for z in logits]
    first = logits[0]
    rows, classes = first.shape[-2], first.shape[-1]
    addresses, strides = table(logits)
    temperatures, thresholds = temperature.view(-1).tolist(), threshold.view(-1).tolist()
    previous_prediction, previous_score = previous
    status = _kernels().gate(
        step,
        DTYPE_CODES[first.dtype],
        torch.get_num_threads(),
        MEASURE_CODES[measure],
        rows,
        rows if live is None else live.item(),
        classes,
        addresses,
        strides,
        temperatures,
        thresholds,
        address(score),
        address(previous_prediction),
        address(previous_score),
        [address(o) for o in outputs],
    )
    if status == 2:
        raise ValueError(
            f"{op}: temperature must be positive and finite; got {temperature.tolist()}"
        )
    if status == 6:
        raise ValueError(f"{op}: threshold must not be NaN; got {threshold.tolist()}")
    if status == 4:
        raise ValueError(f"{op}: live must be between 0 and {rows}; got {live}")
    if status == 3:
        raise MemoryError(f"{op}: no memory for {rows} rows")
    if status:
        raise ValueError(f"{op}: sizes out of range (status {status})")


def exit_gate(
    logits: Sequence[Tensor],
    threshold: Tensor,
    measure: str,
    temperature: Tensor,
    score: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    _, rows, _ = reference.sizes(logits)
    dtype = reference.accumulation_dtype(logits[0].dtype)
    index, prediction = (torch.empty(rows, dtype=torch.int64) for _ in range(2))
    found = torch.empty(rows, dtype=dtype)
    _gate(
        "exit_gate", False, logits, threshold, measure, temperature, real(score, dtype),
        (None, None), None, (prediction, found, index),
    )  # fmt: skip
    return index, prediction, found


def gate_step(
    logits: Tensor,
    threshold: Tensor,
    measure: str,
    temperature: Tensor,
    score: Tensor | None,
    previous_prediction: Tensor | None,
    previous_score: Tensor | None,
    live: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, dtype = logits.shape[0], reference.accumulation_dtype(logits.dtype)
    prediction, stay = (torch.empty(rows, dtype=torch.int64) for _ in range(2))
    found = torch.empty(rows, dtype=dtype)
    count = torch.empty((), dtype=torch.int64)
    if previous_prediction is not None:
        previous_prediction = previous_prediction.contiguous()
    _gate(
        "gate_step", True, (logits,), threshold, measure, temperature, real(score, dtype),
        (previous_prediction, real(previous_score, dtype)), live,
        (prediction, found, stay, count),
    )  # fmt: skip
    return prediction, found, stay, count


def _row_table(tensors: Sequence[Tensor]) -> tuple[list[int], list[int]]:
    """Address of every tensor, and the distance between its rows in bytes."""
    strides = [t.stride(0) * t.element_size() for t in tensors]
    return [address(t) for t in tensors], strides


def _copy_rows(
    op: str,
    scatter: bool,
    source: Sequence[Tensor],
    target: Sequence[Tensor],
    index: Tensor,
    count: int,
) -> None:
    capacity, limit = (s[0].shape[0] for s in ((source, target) if scatter else (target, source)))
    index = index.contiguous()
    for i in range(0, len(source), TENSORS):
        sources, targets = source[i : i + TENSORS], target[i : i + TENSORS]
        (from_address, from_stride), (to_address, to_stride) = map(_row_table, (sources, targets))
        status, bad_index = _kernels().copy_rows(
            scatter,
            torch.get_num_threads(),
            count,
            capacity,
            limit,
            address(index),
            from_address,
            to_address,
            from_stride,
            to_stride,
            [t.nbytes // (t.shape[0] or 1) for t in sources],
        )
        if status == 5:
            raise ValueError(f"{op}: rows must be in [0, {limit}); got {bad_index}")
        if status:
            raise ValueError(f"{op}: count must be between 0 and {capacity}; got {count}")


def compact_rows(
    x: Sequence[Tensor], stay: Tensor, count: Tensor | None, capacity: int
) -> list[Tensor]:
    formats = [reference.row_format(t) for t in x]
    x = [t.contiguous(memory_format=f) for t, f in zip(x, formats, strict=True)]
    result = [
        torch.empty((capacity, *t.shape[1:]), dtype=t.dtype, memory_format=f)
        for t, f in zip(x, formats, strict=True)
    ]
    kept = capacity if count is None else int(count.item())
    _copy_rows("compact_rows", False, x, result, stay, kept)
    return result


def scatter_rows(
    out: Sequence[Tensor], values: Sequence[Tensor], index: Tensor, count: Tensor | None
) -> None:
    # Rows written in place must be dense and laid out like the values.
    targets = [t if t.is_contiguous() else t.contiguous() for t in out]
    kept = values[0].shape[0] if count is None else int(count.item())
    _copy_rows("scatter_rows", True, [v.contiguous() for v in values], targets, index, kept)
    for t, written in zip(out, targets, strict=True):
        if written is not t:
            t.copy_(written)

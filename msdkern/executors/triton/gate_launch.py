# SPDX-License-Identifier: Apache-2.0
"""The gate family of executor `triton`: gates, and the rows that stay.

As in launch.py nothing waits for the device. What a kernel finds wrong there is not raised: a
temperature that is not positive or a threshold that is NaN lets no row leave before the last exit,
and a row that does not exist is 0 where it is gathered and written nowhere. MSDKERN_CHECK=1 makes
them errors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from msdkern import reference
from msdkern.executors import rules
from msdkern.executors.tables import address

from . import table
from .compact import copy_rows_kernel, encode
from .gate import exit_gate_kernel, gate_step_kernel, order_kernel
from .launch import EXACT
from .tensors import (
    REAL,
    Exits,
    check_positive,
    checks_values,
    exits_of,
    on_device,
    per_exit,
    real_of,
    tickets,
)

SPAN = 4096  # rows that share a counter; up to so many are put in order without another launch
WIDEST_WORD = 16  # bytes
WORDS_AT_ONCE = 1024
TENSORS = 32  # that one launch copies


INDICES = (torch.int64, torch.int64)


def _new(like: Tensor, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)


def _check(op: str, threshold: Tensor, temperature: Tensor) -> None:
    if checks_values(threshold):
        rules.threshold(op, threshold)
    check_positive(op, "temperature", temperature)


def _options(z: Exits, measure: str) -> dict[str, Any]:
    """The constants of a kernel that reads rows for a measure."""
    like = z.tensors[0]
    plan = table.gate_plan(like.shape[1], like.element_size())
    return {
        "MEASURE": reference.MEASURES.index(measure), "RESIDENT": plan.resident, "STEP": z.step,
        "TILES": plan.tiles, "ROWS": plan.rows, "BLOCK": plan.block,
        "REAL": REAL[real_of(like)], "num_warps": plan.warps, **EXACT,
    }  # fmt: skip


def exit_gate(
    logits: Sequence[Tensor],
    threshold: Tensor,
    measure: str,
    temperature: Tensor,
    score: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    _check("exit_gate", threshold, temperature)
    like, (exits, rows, classes) = logits[0], reference.sizes(logits)
    index, prediction, found = (_new(like, d, rows) for d in (*INDICES, real_of(like)))
    if rows == 0:
        return index, prediction, found
    (z,) = exits_of(logits)
    options = _options(z, measure)
    limit, of_threshold = per_exit(threshold, exits, found)
    t, of_temperature = per_exit(temperature, exits, found)
    with on_device(like):
        exit_gate_kernel[(-(-rows // options["ROWS"]),)](
            z.tensors, z.strides, limit, t, None if score is None else score.contiguous(), index,
            prediction, found, rows, classes // z.step, THRESHOLD=of_threshold,
            TEMPERATURE=of_temperature, K=exits, **options,
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
    _check("gate_step", threshold, temperature)
    rows, classes = logits.shape
    _check_between("gate_step", "live", live, rows)
    prediction, stay, found = (_new(logits, d, rows) for d in (*INDICES, real_of(logits)))
    count = _new(logits, torch.int64)
    if rows == 0:
        return prediction, found, stay, count.zero_()
    (z,) = exits_of((logits,))
    options = _options(z, measure)
    limit, of_threshold = per_exit(threshold, 1, found)
    t, of_temperature = per_exit(temperature, 1, found)
    inputs = (score, previous_prediction, previous_score)
    given = tuple(None if x is None else x.contiguous() for x in inputs)
    spans = -(-rows // SPAN)
    with on_device(logits):
        stays = _new(logits, torch.int8, rows)
        # Zeros that the kernel leaves as zeros, or that it does not.
        counters = tickets(logits, 1) if spans == 1 else _new(logits, torch.int32, spans).zero_()
        gate_step_kernel[(-(-rows // options["ROWS"]),)](
            z.tensors, z.strides, limit, t, *given, live, prediction, found, stays, stay, count,
            counters, rows, classes // z.step, THRESHOLD=of_threshold, TEMPERATURE=of_temperature,
            ALONE=spans == 1, SPAN=SPAN, **options,
        )  # fmt: skip
        if spans > 1:
            order_kernel[(spans,)](stays, stay, count, counters, rows, SPAN=SPAN, num_warps=4)
    return prediction, found, stay, count


# Rows -------------------------------------------------------------------------------------------


def _check_between(op: str, name: str, value: Tensor | None, most: int) -> None:
    if value is not None and checks_values(value) and not 0 <= value.item() <= most:
        raise ValueError(f"{op}: {name} must be between 0 and {most}; got {value.item()}")


def _check_index(op: str, index: Tensor, count: Tensor | None, rows: int, limit: int) -> None:
    if checks_values(index):
        _check_between(op, "count", count, rows)
        rules.rows_exist(op, index, count, rows, limit)


def _dense_rows(x: Tensor, layout: torch.memory_format) -> bool:
    """Whether every row is one piece of memory in that layout, however far rows are apart."""
    if x.is_contiguous(memory_format=layout):
        return True
    axes = list(range(1, x.dim()))
    if layout != torch.contiguous_format:
        axes = [*axes[1:], 1]
    length = 1
    for axis in reversed(axes):
        if x.shape[axis] != 1 and x.stride(axis) != length:
            return False
        length *= x.shape[axis]
    return True


def _entries(source: Sequence[Tensor], target: Sequence[Tensor], rows: int) -> list[list[int]]:
    """The kernel's table, but for the first program of each tensor, and with the number of its
    programs instead."""
    found = []
    for s, t in zip(source, target, strict=True):
        size = s.element_size()
        length = math.prod(s.shape[1:]) * size
        numbers = (address(s), address(t), s.stride(0) * size, t.stride(0) * size, length)
        if length == 0:
            continue
        word = math.gcd(WIDEST_WORD, *numbers)
        words = [n // word for n in numbers]
        found.append([*words, word, -(-rows * words[-1] // WORDS_AT_ONCE)])
    return found


def _copy_rows(
    scatter: bool,
    source: Sequence[Tensor],
    target: Sequence[Tensor],
    index: Tensor,
    count: Tensor | None,
) -> None:
    rows, limit = (s[0].shape[0] for s in ((source, target) if scatter else (target, source)))
    entries = _entries(source, target, rows) if rows else []
    index = index.contiguous()
    for i in range(0, len(entries), TENSORS):
        part, programs = entries[i : i + TENSORS], 0
        for entry in part:
            entry[-1], programs = programs, programs + entry[-1]
        # Numbers of tensors that are powers of two, so that there are few kernels: the others have
        # no programs.
        empty = [[*part[0][:-1], programs]] * (table.power_of_two(len(part)) - len(part))
        rows_of = tuple(tuple(encode(n) for n in entry) for entry in (*part, *empty))
        with on_device(index):
            copy_rows_kernel[(programs,)](
                rows_of, index, count, rows, limit, SCATTER=scatter, TENSORS=len(rows_of),
                BLOCK=WORDS_AT_ONCE, num_warps=4,
            )  # fmt: skip


def compact_rows(
    x: Sequence[Tensor], stay: Tensor, count: Tensor | None, capacity: int
) -> list[Tensor]:
    _check_index("compact_rows", stay, count, capacity, x[0].shape[0])
    layouts = [reference.row_format(t) for t in x]
    source = [
        t if _dense_rows(t, f) else t.contiguous(memory_format=f)
        for t, f in zip(x, layouts, strict=True)
    ]
    result = [
        torch.empty((capacity, *t.shape[1:]), dtype=t.dtype, device=t.device, memory_format=f)
        for t, f in zip(x, layouts, strict=True)
    ]
    _copy_rows(False, source, result, stay, count)
    return result


def scatter_rows(
    out: Sequence[Tensor], values: Sequence[Tensor], index: Tensor, count: Tensor | None
) -> None:
    _check_index("scatter_rows", index, count, values[0].shape[0], out[0].shape[0])
    layouts = [reference.row_format(t) for t in out]
    # Rows written in place must be dense; others are written beside and copied.
    target = [t if _dense_rows(t, f) else t.contiguous() for t, f in zip(out, layouts, strict=True)]
    source = [
        v if _dense_rows(v, f) else v.contiguous(memory_format=f)
        for v, f in zip(values, layouts, strict=True)
    ]
    _copy_rows(True, source, target, index, count)
    for t, written in zip(out, target, strict=True):
        if written is not t:
            t.copy_(written)

# SPDX-License-Identifier: Apache-2.0
"""What the launches share: pointers and strides of exits, numbers by value, scratch memory."""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from msdkern import reference
from msdkern.executors import rules

REAL = {torch.float32: tl.float32, torch.float64: tl.float64}
WIDEST_STEP = 16  # elements; 16 bytes of the narrowest dtype are 8 of them


def real_of(tensor: Tensor) -> torch.dtype:
    return reference.accumulation_dtype(tensor.dtype)


def on_device(tensor: Tensor) -> Any:
    """Launches go to the device of the tensors, whichever is current."""
    if tensor.device.type != "cuda":
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


def checks_values(tensor: Tensor) -> bool:
    """Whether values may be read: on a CPU, and where a synchronisation was asked for."""
    return tensor.device.type == "cpu" or os.environ.get("MSDKERN_CHECK") == "1"


def check_positive(op: str, name: str, value: Tensor) -> None:
    if checks_values(value):
        rules.positive(op, value, name)


def check_count(op: str, name: str, value: Tensor) -> None:
    if checks_values(value):
        rules.not_negative(op, value, name)


def check_labels(op: str, label: Tensor | None, classes: int, skip: int) -> None:
    if label is not None and checks_values(label):
        rules.labels(op, label, classes, skip)


class Exits(NamedTuple):
    """K tensors [N, C] with unit column stride, their row strides in units of `step`."""

    tensors: tuple[Tensor, ...]
    strides: tuple[int, ...]
    step: int


def unstack(tensors: Sequence[Tensor]) -> list[Tensor]:
    """K views [N, C], each with its own address; copies only where columns are not neighbours."""
    given = tensors[0].unbind(0) if tensors and tensors[0].dim() == 3 else tensors
    return [t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous() for t in given]


def exits_of(tensors: Sequence[Tensor], *more: Sequence[Tensor]) -> tuple[Exits, ...]:
    """Every group of tensors, with one common step."""
    groups = [unstack(group) for group in (tensors, *more)]
    strides = [[t.stride(0) for t in group] for group in groups]
    step = math.gcd(groups[0][0].shape[-1], *(s for group in strides for s in group))
    step = math.gcd(step, WIDEST_STEP)
    return tuple(
        Exits(tuple(group), tuple(s // step for s in of), step)
        for group, of in zip(groups, strides, strict=True)
    )


def number(value: Tensor | float, real: torch.dtype, like: Tensor) -> tuple[Any, bool]:
    """What a kernel receives, and whether that is a pointer: a number by value, as Triton passes
    it, in float32; in float64 through the device's memory."""
    if isinstance(value, Tensor):
        if value.device.type != "cpu" or like.device.type == "cpu":
            return value, True
        value = value.item()  # of a CPU tensor: nothing waits
    if real == torch.float64:
        return torch.full((), float(value), dtype=real, device=like.device), True
    return float(value), False


def numbers(
    values: Sequence[Tensor | float | None], real: torch.dtype, like: Tensor
) -> tuple[list[Any], int]:
    """Several, and a bit for each that is a pointer."""
    passed, pointers = [], 0
    for bit, value in enumerate(values):
        taken, pointer = (None, False) if value is None else number(value, real, like)
        passed.append(taken)
        pointers |= int(pointer) << bit
    return passed, pointers


VALUES, ONE_IN_MEMORY, ALL_IN_MEMORY = 0, 1, 2


def per_exit(value: Tensor, exits: int, like: Tensor) -> tuple[Any, int]:
    """One number or K: as K numbers by value, or where they lie, in memory; `like` is a score."""
    if value.device.type != "cpu" or like.device.type == "cpu":
        return value.contiguous(), ONE_IN_MEMORY if value.dim() == 0 else ALL_IN_MEMORY
    passed = value.view(-1).expand(exits).tolist()
    if like.dtype != torch.float64:
        return tuple(passed), VALUES
    memory = like.new_empty(exits)
    for one, number in zip(memory, passed, strict=True):
        one.fill_(number)  # a copy would not be recorded in a graph
    return memory, ALL_IN_MEMORY


# Tickets --------------------------------------------------------------------------------------

FEWEST_TICKETS = 1024


@functools.lru_cache(maxsize=256)
def _kept_tickets(device: torch.device, stream: int, count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int32, device=device)


def tickets(like: Tensor, count: int) -> Tensor:
    """Zeros that the kernel leaves as zeros, so that they need no launch of their own: kept per
    stream, whose kernels follow each other. A graph gets its own, as it may run beside them."""
    count = max(FEWEST_TICKETS, 1 << (count - 1).bit_length())
    if like.device.type != "cuda":
        return _kept_tickets(like.device, 0, count)
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(count, dtype=torch.int32, device=like.device)
    stream = torch.cuda.current_stream(like.device).cuda_stream
    return _kept_tickets(like.device, stream, count)

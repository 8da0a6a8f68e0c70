# SPDX-License-Identifier: Apache-2.0
"""What every op asks of its arguments. A broken rule is one sentence: op, rule, value.

The checks read only what Python knows of a tensor (type, shape, dtype, device): no host
synchronisation. Values are checked by the executors (labels, temperatures held in tensors).
"""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

MAX_EXITS = 32
NUMBERS = (int, float, numbers.Real, torch.SymFloat, torch.SymInt)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def describe(value: object) -> str:
    """A tensor as `int32 [64]`, anything else by its value."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, (list, tuple)):
        return f"{len(value)} x {describe(value[0])}" if value else "an empty sequence"
    return repr(value)


def fail(op: str, rule: str, value: object, error: type[Exception] = ValueError) -> NoReturn:
    raise error(f"{op}: {rule}; got {describe(value)}")


def plain(op: str, name: str, tensor: object) -> Tensor:
    """A dense tensor on one device: not sparse, not quantised, not a DTensor."""
    if not isinstance(tensor, Tensor):
        fail(op, f"{name} must be a tensor", type(tensor).__name__, TypeError)
    if tensor.layout != torch.strided or tensor.is_nested:
        fail(op, f"{name} must be dense", str(tensor.layout), TypeError)
    if type(tensor) is not Tensor and hasattr(tensor, "placements"):
        fail(
            op, f"{name} must be a plain tensor (call .full_tensor() first)", "a DTensor", TypeError
        )
    return tensor


def rows_and_classes(op: str, logits: Sequence[Tensor]) -> tuple[int, int, int]:
    """K, N and C of a list of [N, C] tensors or of one [K, N, C]; every tensor alike."""
    first = plain(op, "logits", logits[0])
    kind, layout = type(first), first.layout
    shape, dtype, device = first.shape, first.dtype, first.device
    if dtype not in DTYPES:
        fail(op, "logits must be float32, bfloat16, float16 or float64", first, TypeError)
    for z in logits:
        if z is not first and not (
            type(z) is kind
            and z.dtype is dtype
            and z.layout is layout
            and z.device == device
            and z.shape == shape
        ):
            plain(op, "logits", z)
            if z.shape != shape or z.dtype != dtype or z.device != device:
                rule = "all exits must have the same shape, dtype and device"
                fail(op, rule, f"{describe(first)} on {device} and {describe(z)} on {z.device}")
    exits = len(logits) if len(shape) == 2 else shape[0]
    if not 1 <= exits <= MAX_EXITS:
        fail(op, f"the number of exits must be between 1 and {MAX_EXITS}", exits)
    if shape[-1] < 1:
        fail(op, "logits must have at least one class", first)
    return exits, shape[-2], shape[-1]


def exits(op: str, logits: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """K tensors [N, C] as a list, or one tensor [K, N, C] as a list of one."""
    if isinstance(logits, Tensor):
        if logits.dim() != 3:
            fail(op, "logits must be a sequence of [N, C] tensors or one [K, N, C] tensor", logits)
        return [logits]
    if not isinstance(logits, (list, tuple)) or not logits:
        rule = "logits must be a sequence of [N, C] tensors or one [K, N, C] tensor"
        fail(op, rule, logits if isinstance(logits, (list, tuple)) else type(logits).__name__)
    if not isinstance(logits[0], Tensor) or logits[0].dim() != 2:
        fail(op, "each exit's logits must be a tensor [N, C]", logits[0])
    return list(logits)


def no_gradient(op: str, name: str, value: object) -> None:
    """Refuse a gradient that would silently be dropped."""
    if isinstance(value, Tensor) and value.requires_grad:
        fail(op, f"{name} must not require a gradient (detach it)", value)


def _new_constant(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, device="cpu")


_constant = functools.lru_cache(maxsize=1024)(_new_constant)


def scalar(op: str, name: str, value: float | Tensor, like: Tensor) -> Tensor:
    """A number or a 0-d tensor as a 0-d tensor.

    A number becomes a CPU constant, which kernels receive by value. While a graph is being
    compiled it becomes a tensor on the device of the logits, so that another value needs no
    other graph.
    """
    if isinstance(value, Tensor):
        no_gradient(op, name, plain(op, name, value))
        if value.dim() != 0 or not (value.is_floating_point() or name == "normalizer"):
            fail(op, f"{name} must be a number or a 0-d floating-point tensor", value)
        if value.device.type != "cpu" and value.device != like.device:
            rule = f"{name} must be on the CPU or on the device of the logits ({like.device})"
            fail(op, rule, str(value.device))
        return value
    if not isinstance(value, NUMBERS):
        fail(op, f"{name} must be a number or a 0-d tensor", value, TypeError)
    if torch.compiler.is_compiling():
        # A product, because torch.full() would bake the number into the graph.
        return torch.ones((), dtype=torch.float64, device=like.device) * value
    # A mode (fake tensors, say) makes tensors of its own kind, which must not be kept or mixed.
    modes = torch._C._len_torch_dispatch_stack()
    return _new_constant(float(value)) if modes else _constant(float(value))


def per_exit(op: str, name: str, value: Any, exits: int | None, like: Tensor) -> Tensor:
    """A threshold or temperature: a number or a 0-d tensor; with ``exits`` also K of either.

    Numbers are checked here, tensors by the executors.
    """
    if (isinstance(value, Tensor) and value.dim() == 0) or isinstance(value, NUMBERS):
        if isinstance(value, NUMBERS) and isinstance(value, (int, float)):
            _number(op, name, value)
        return scalar(op, name, value, like)  # type: ignore[arg-type]
    rule = f"{name} must be a number" + (f" or {exits} numbers, one per exit" if exits else "")
    if exits is None or not isinstance(value, (Tensor, list, tuple)):
        fail(op, rule, value)
    if isinstance(value, Tensor):
        no_gradient(op, name, plain(op, name, value))
        if value.dim() != 1 or value.shape[0] != exits or not value.is_floating_point():
            fail(op, rule, value)
        if value.device.type != "cpu" and value.device != like.device:
            rule = f"{name} must be on the CPU or on the device of the logits ({like.device})"
            fail(op, rule, str(value.device))
        return value
    if len(value) != exits or not all(isinstance(v, NUMBERS) for v in value):
        fail(op, rule, list(value))
    for v in value:
        _number(op, name, v)
    return torch.tensor(value, dtype=torch.float64, device="cpu")


def _number(op: str, name: str, value: Any) -> None:
    if name == "temperature":
        positive(op, name, value)
    elif value != value:
        fail(op, f"{name} must not be NaN", value)


def positive(op: str, name: str, value: float | Tensor) -> None:
    if isinstance(value, Tensor):
        return  # read by the executors, where that needs no synchronisation
    if not isinstance(value, NUMBERS):
        fail(op, f"{name} must be a number or a 0-d tensor", value, TypeError)
    if not (value > 0 and value < math.inf):
        fail(op, f"{name} must be positive and finite", value)


def count(op: str, name: str, value: float | Tensor) -> None:
    """What a sum is divided by: 0 where nothing was counted."""
    if isinstance(value, Tensor):
        return
    if not isinstance(value, NUMBERS):
        fail(op, f"{name} must be a number or a 0-d tensor", value, TypeError)
    if not (value >= 0 and value < math.inf):
        fail(op, f"{name} must be finite and not negative", value)


def share(op: str, name: str, value: float) -> None:
    """A number between 0 and 1."""
    if not isinstance(value, NUMBERS) or not 0.0 <= value <= 1.0:
        fail(op, f"{name} must be between 0 and 1", value)


def choice(op: str, name: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        fail(op, f"{name} must be one of {', '.join(allowed)}", value)

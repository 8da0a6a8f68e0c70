# SPDX-License-Identifier: Apache-2.0
"""Executor `cpu`, and what `cpu` and `cuda` share: calls of the native kernels.

The only file that reads the addresses of tensors. Every call arrives here through a registered op,
on plain strided tensors that the checks in msdkern/ops have seen. This file lays out pointer
tables and outputs, and turns status codes into sentences; executors/cuda.py says where a call runs.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from msdkern import reference

ABI_VERSION = 2
DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}
PAIR_CODES = {"none": 0, "mutual": 1, "last": 2, "deeper": 3, "next": 4, "dense": 5}
DIVERGENCE_CODES = {"forward_kl": 0, "reverse_kl": 1, "jsd": 2, "soft_ce": 3}
SCALAR, ROWS, ROWS_BACKWARD = 0, 1, 2


def load_module(name: str) -> tuple[Any, str | None]:
    """A native module that has this package's ABI, or None and why there is none."""
    try:
        module = importlib.import_module(f"msdkern.{name}")
    except ImportError as error:
        return None, f"the native module msdkern.{name} is not there ({error})"
    if module.abi_version != ABI_VERSION:
        return None, (
            f"msdkern.{name} has ABI version {module.abi_version}, this package needs "
            f"{ABI_VERSION}: install again"
        )
    return module, None


@functools.cache
def _load() -> tuple[Any, str | None]:
    return load_module("_cpu")


def reason() -> str | None:
    return _load()[1]


# Pointer tables -------------------------------------------------------------------------------


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _unit_columns(tensor: Tensor) -> Tensor:
    """The tensor itself, or a copy where neighbouring classes are not neighbours in memory."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _table(tensors: Sequence[Tensor]) -> tuple[list[int], list[int]]:
    """Address and row stride of every exit, for K tensors [N, C] or one [K, N, C]."""
    first = tensors[0]
    if first.dim() == 3:
        step, row, _ = first.stride()
        step *= first.element_size()
        start = first.data_ptr()
        return [start + k * step for k in range(first.shape[0])], [row] * first.shape[0]
    return [t.data_ptr() for t in tensors], [t.stride(0) for t in tensors]


def _gradient_table(
    logits: Sequence[Tensor], wanted: Sequence[bool]
) -> tuple[list[Tensor], list[int]]:
    """Fresh contiguous gradients, and the address of each exit's (0 where none is wanted)."""
    if not any(wanted):
        return [], []
    fresh = [
        torch.empty_like(z, memory_format=torch.contiguous_format) if want else None
        for z, want in zip(logits, wanted, strict=True)
    ]
    kept = [g for g in fresh if g is not None]
    if kept[0].dim() == 3:
        return kept, _table(kept)[0]
    return kept, [address(g) for g in fresh]


def _real(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype).contiguous()


# The loss family ------------------------------------------------------------------------------


def _fail(
    op: str, status: int, bad_label: int, classes: int, skip: int, temperature: float
) -> NoReturn:
    sentences = {
        1: f"labels must be in [0, {classes}) or ignore_index = {skip}; got {bad_label}",
        2: f"temperature must be positive and finite; got {temperature}",
    }
    if status == 3:
        raise MemoryError(f"{op}: no memory for scratch rows of {classes} classes")
    raise ValueError(f"{op}: {sentences.get(status, f'sizes out of range (status {status})')}")


class Machine:
    """The ops on one kind of machine: here the CPU."""

    def kernels(self) -> Any:
        return _load()[0]

    def device(self, like: Tensor) -> torch.device | None:
        """Where outputs are allocated; None is the CPU."""
        return None

    def number(self, value: Tensor, dtype: torch.dtype) -> tuple[float, Tensor | None]:
        """A 0-d tensor as a number that kernels get by value, or as one whose address they get."""
        return float(value.item()), None

    def place(
        self, like: Tensor, exits: int, teachers: int, scalars: Sequence[Tensor | None]
    ) -> Any:
        """Where a call runs, as the binding takes it."""
        return torch.get_num_threads()

    def fail(self, op: str, status: int) -> None:
        """Raise for a status that only this kind of machine returns."""

    # The loss family

    def _call_loss(
        self,
        op: str,
        form: int,
        outputs: Sequence[Tensor | None],
        gradient: Sequence[bool],
        mean: bool,
        normalizer: Tensor | None,
        logits: Sequence[Tensor],
        teacher_logits: Sequence[Tensor],
        target: Tensor | None,
        exit_weight: Tensor | None,
        pairs: str,
        pair_weight: Tensor | None,
        pair_scale: Tensor,
        temperature: Tensor,
        temperature_squared: bool,
        divergence: str,
        beta: float,
        detach_teacher: bool,
        class_weight: Tensor | None,
        ignore_index: int,
        label_smoothing: float,
    ) -> list[Tensor]:
        """One call of the kernels; returns the gradients."""
        dtype = logits[0].dtype
        logits = [_unit_columns(z) for z in logits]
        exits, rows, classes = reference.sizes(logits)
        addresses, strides = _table(logits)
        if teacher_logits:
            teacher_logits = [_unit_columns(t) for t in teacher_logits]
            more = _table(teacher_logits)
            addresses, strides = addresses + more[0], strides + more[1]
        gradients, gradient_addresses = _gradient_table(logits, gradient)
        label = probabilities = None
        if target is not None:
            if target.dtype == torch.int64:
                label = target.contiguous()
            else:
                probabilities = _real(target, reference.accumulation_dtype(dtype))
        if divergence == "jsd" and beta in (0.0, 1.0):
            divergence = "reverse_kl" if beta else "forward_kl"
        t, t_there = self.number(temperature, dtype)
        scale, scale_there = self.number(pair_scale, dtype)
        divisor, divisor_there = 0.0, None  # none given
        if normalizer is not None:
            divisor, divisor_there = self.number(normalizer, dtype)
            if not 0 <= divisor < math.inf:
                raise ValueError(f"{op}: normalizer must be finite and not negative; got {divisor}")
            divisor = divisor or math.inf  # no rows counted: r = 0
        there = (t_there, scale_there, divisor_there)
        status, bad_label = self.kernels().loss(
            form,
            DTYPE_CODES[dtype],
            self.place(logits[0], exits, len(teacher_logits), there),
            exits,
            rows,
            classes,
            addresses,
            strides,
            gradient_addresses,
            address(label),
            address(probabilities),
            address(exit_weight),
            exit_weight is not None and exit_weight.dim() == 2,
            PAIR_CODES[pairs],
            address(pair_weight),
            pair_weight is not None and pair_weight.dim() == 3,
            scale,
            t,
            temperature_squared,
            DIVERGENCE_CODES[divergence],
            beta,
            detach_teacher,
            address(class_weight),
            ignore_index,
            label_smoothing,
            mean,
            divisor,
            [address(o) for o in outputs],
        )
        if status:
            self.fail(op, status)
            _fail(op, status, bad_label, classes, ignore_index, t)
        return gradients

    def multi_exit_loss(
        self, logits: Sequence[Tensor], teacher_logits: Sequence[Tensor], *arguments: Any
    ) -> tuple[Any, ...]:
        *row_arguments, reduction, normalizer, pair_divergence, gradient = arguments
        exits, rows, _ = reference.sizes(logits)
        dtype, device = reference.accumulation_dtype(logits[0].dtype), self.device(logits[0])
        matrix = (exits, exits + len(teacher_logits)) if pair_divergence else (0,)
        outputs = (
            torch.empty((), dtype=dtype, device=device),
            torch.empty(exits, dtype=dtype, device=device),
            torch.empty(exits, dtype=dtype, device=device),
            torch.empty(*matrix, dtype=dtype, device=device),
            torch.empty(exits, rows, dtype=torch.int64, device=device),
            torch.empty(exits, rows, dtype=dtype, device=device),
        )
        wanted = outputs if pair_divergence else (*outputs[:3], None, *outputs[4:])
        gradients = self._call_loss(
            "multi_exit_loss", SCALAR, wanted, gradient, reduction == "mean", normalizer,
            logits, teacher_logits, *row_arguments,
        )  # fmt: skip
        return (*outputs, gradients)

    def multi_exit_row_losses(
        self, logits: Sequence[Tensor], *arguments: Any
    ) -> tuple[Tensor, ...]:
        dtype, device = reference.accumulation_dtype(logits[0].dtype), self.device(logits[0])
        shape = reference.sizes(logits)[:2]
        outputs = tuple(torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
        op = "multi_exit_row_losses"
        self._call_loss(op, ROWS, outputs, (), False, None, logits, *arguments)
        return outputs

    def multi_exit_row_losses_backward(
        self,
        grad_cross_entropy: Tensor,
        grad_divergence: Tensor,
        logits: Sequence[Tensor],
        *arguments: Any,
    ) -> list[Tensor]:
        *row_arguments, gradient = arguments
        dtype = reference.accumulation_dtype(logits[0].dtype)
        upstream = [_real(g, dtype) for g in (grad_cross_entropy, grad_divergence)]
        return self._call_loss(
            "multi_exit_row_losses", ROWS_BACKWARD, upstream, gradient, False, None, logits,
            *row_arguments,
        )  # fmt: skip

    # Softmax, statistics, scaling

    def _softmax(
        self,
        backward: bool,
        inputs: Sequence[Tensor],
        upstream: Sequence[Tensor],
        temperature: Tensor,
        log: bool,
    ) -> list[Tensor]:
        inputs = [_unit_columns(z) for z in inputs]
        upstream = [_unit_columns(g) for g in upstream]
        exits, rows, classes = reference.sizes(inputs)
        dtype, device = inputs[0].dtype, self.device(inputs[0])
        outputs = [torch.empty(z.shape, dtype=dtype, device=device) for z in inputs]
        t, there = self.number(temperature, dtype)
        op = "multi_exit_softmax"
        status = self.kernels().softmax(
            backward,
            DTYPE_CODES[dtype],
            self.place(inputs[0], exits, 0, (there,)),
            rows,
            classes,
            t,
            log,
            *_table(inputs),
            *(_table(upstream) if upstream else ([], [])),
            _table(outputs)[0],
        )
        if status:
            self.fail(op, status)
            _fail(op, status, 0, classes, 0, t)
        return outputs

    def multi_exit_softmax(
        self, logits: Sequence[Tensor], temperature: Tensor, log: bool
    ) -> list[Tensor]:
        return self._softmax(False, logits, (), temperature, log)

    def multi_exit_softmax_backward(
        self, gradients: Sequence[Tensor], outputs: Sequence[Tensor], temperature: Tensor, log: bool
    ) -> list[Tensor]:
        return self._softmax(True, outputs, gradients, temperature, log)

    def exit_statistics(self, logits: Sequence[Tensor]) -> tuple[Tensor, ...]:
        logits = [_unit_columns(z) for z in logits]
        exits, rows, classes = reference.sizes(logits)
        dtype, device = reference.accumulation_dtype(logits[0].dtype), self.device(logits[0])
        dtypes = (dtype, dtype, torch.int64, dtype, dtype, dtype)
        outputs = tuple(torch.empty((exits, rows), dtype=d, device=device) for d in dtypes)
        status = self.kernels().statistics(
            DTYPE_CODES[logits[0].dtype],
            self.place(logits[0], exits, 0, ()),
            rows,
            classes,
            *_table(logits),
            [address(o) for o in outputs],
        )
        if status:
            self.fail("exit_statistics", status)
            _fail("exit_statistics", status, 0, classes, 0, 1.0)
        return outputs

    def scale_(self, tensors: Sequence[Tensor], factor: Tensor) -> None:
        dtype = tensors[0].dtype
        value, there = self.number(factor, dtype)
        if there is None and value == 1.0:
            return
        status = self.kernels().scale(
            DTYPE_CODES[dtype],
            self.place(tensors[0], 1, 0, (there,)),
            value,
            [address(t) for t in tensors],
            [t.numel() for t in tensors],
        )
        if status:
            self.fail("scale_", status)


_cpu = Machine()
multi_exit_loss = _cpu.multi_exit_loss
multi_exit_row_losses = _cpu.multi_exit_row_losses
multi_exit_row_losses_backward = _cpu.multi_exit_row_losses_backward
multi_exit_softmax = _cpu.multi_exit_softmax
multi_exit_softmax_backward = _cpu.multi_exit_softmax_backward
exit_statistics = _cpu.exit_statistics
scale_ = _cpu.scale_

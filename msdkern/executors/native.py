# SPDX-License-Identifier: Apache-2.0
"""Executor `cpu`, and what `cpu` and `cuda` share: calls of the native kernels.

Every call arrives here through a registered op,
on plain strided tensors that the checks in msdkern/ops have seen. This file lays out pointer
tables and outputs, and turns status codes into sentences; executors/cuda.py says where a call runs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from msdkern import reference
from msdkern.executors.arguments import (
    DIVERGENCE_CODES,
    PAIR_CODES,
    ROWS,
    ROWS_BACKWARD,
    SCALAR,
    LossArguments,
)
from msdkern.executors.native_gate import Gates
from msdkern.executors.tables import (
    ABI_VERSION,
    DTYPE_CODES,
    address,
    gradient_table,
    load_module,
    real,
    table,
)

__all__ = ["ABI_VERSION"]


@functools.cache
def _load() -> tuple[Any, str | None]:
    return load_module("_cpu")


def reason() -> str | None:
    return _load()[1]


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


class Machine(Gates):
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
        given: LossArguments,
    ) -> list[Tensor]:
        """One call of the kernels; returns the gradients."""
        dtype = logits[0].dtype
        exits, rows, classes = reference.sizes(logits)
        addresses, strides, copies = table(logits)
        if given.teacher_logits:
            more = table(given.teacher_logits)
            addresses, strides, copies = addresses + more[0], strides + more[1], copies + more[2]
        gradients, gradient_addresses = gradient_table(logits, gradient)
        label = given.label
        probabilities = real(given.probabilities, reference.accumulation_dtype(dtype))
        exit_rows, pair_rows = given.by_row
        t, t_there = self.number(given.temperature, dtype)
        scale, scale_there = self.number(given.pair_scale, dtype)
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
            self.place(logits[0], exits, len(given.teacher_logits), there),
            exits,
            rows,
            classes,
            addresses,
            strides,
            gradient_addresses,
            address(label),
            address(probabilities),
            address(given.exit_weight),
            exit_rows,
            PAIR_CODES[given.pairs],
            address(given.pair_weight),
            pair_rows,
            scale,
            t,
            given.temperature_squared,
            DIVERGENCE_CODES[given.formula],
            given.beta,
            given.detach_teacher,
            address(given.class_weight),
            given.ignore_index,
            given.label_smoothing,
            mean,
            divisor,
            [0 if o is None else o.data_ptr() for o in outputs],
        )
        if status:
            self.fail(op, status)
            _fail(op, status, bad_label, classes, given.ignore_index, t)
        return gradients

    def multi_exit_loss(self, logits: Sequence[Tensor], *arguments: Any) -> tuple[Any, ...]:
        *row_arguments, reduction, normalizer, pair_divergence, gradient = arguments
        given = LossArguments(*row_arguments)
        exits, rows, _ = reference.sizes(logits)
        dtype, device = reference.accumulation_dtype(logits[0].dtype), self.device(logits[0])
        # For small batches the allocations are a third of the call. PyTorch takes longest to read a
        # tuple of sizes, less for integers, and least for a tensor to be like.
        per_exit = torch.empty(exits, dtype=dtype, device=device)
        per_row = torch.empty(exits, rows, dtype=dtype, device=device)
        matrix = (exits, exits + len(given.teacher_logits)) if pair_divergence else (0,)
        outputs = (
            torch.empty_strided((), (), dtype=dtype, device=device),
            per_exit,
            torch.empty_like(per_exit),
            torch.empty(*matrix, dtype=dtype, device=device),
            torch.empty_like(per_row, dtype=torch.int64),
            per_row,
        )
        wanted = outputs if pair_divergence else (*outputs[:3], None, *outputs[4:])
        gradients = self._call_loss(
            "multi_exit_loss", SCALAR, wanted, gradient, reduction == "mean", normalizer,
            logits, given,
        )  # fmt: skip
        return (*outputs, gradients)

    def multi_exit_row_losses(
        self, logits: Sequence[Tensor], *arguments: Any
    ) -> tuple[Tensor, ...]:
        dtype, device = reference.accumulation_dtype(logits[0].dtype), self.device(logits[0])
        shape = reference.sizes(logits)[:2]
        outputs = tuple(torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
        op = "multi_exit_row_losses"
        given = LossArguments(*arguments)
        self._call_loss(op, ROWS, outputs, (), False, None, logits, given)
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
        upstream = [real(g, dtype) for g in (grad_cross_entropy, grad_divergence)]
        return self._call_loss(
            "multi_exit_row_losses", ROWS_BACKWARD, upstream, gradient, False, None, logits,
            LossArguments(*row_arguments),
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
        exits, rows, classes = reference.sizes(inputs)
        dtype, device = inputs[0].dtype, self.device(inputs[0])
        outputs = [torch.empty(z.shape, dtype=dtype, device=device) for z in inputs]
        t, there = self.number(temperature, dtype)
        op = "multi_exit_softmax"
        addresses, strides, _copies = table(inputs)
        upward, upward_strides, _more = table(upstream) if upstream else ([], [], [])
        status = self.kernels().softmax(
            backward,
            DTYPE_CODES[dtype],
            self.place(inputs[0], exits, 0, (there,)),
            rows,
            classes,
            t,
            log,
            addresses,
            strides,
            upward,
            upward_strides,
            table(outputs)[0],
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
        exits, rows, classes = reference.sizes(logits)
        addresses, strides, _copies = table(logits)
        dtype, device = reference.accumulation_dtype(logits[0].dtype), self.device(logits[0])
        dtypes = (dtype, dtype, torch.int64, dtype, dtype, dtype)
        outputs = tuple(torch.empty((exits, rows), dtype=d, device=device) for d in dtypes)
        status = self.kernels().statistics(
            DTYPE_CODES[logits[0].dtype],
            self.place(logits[0], exits, 0, ()),
            rows,
            classes,
            addresses,
            strides,
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
exit_gate = _cpu.exit_gate
gate_step = _cpu.gate_step
compact_rows = _cpu.compact_rows
scatter_rows = _cpu.scatter_rows
scale_ = _cpu.scale_

# SPDX-License-Identifier: Apache-2.0
"""The ops of executor `triton`: arguments laid out, outputs allocated, one kernel launched each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

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

from . import registers, table
from .cross_entropy import count_kernel
from .loss import loss_kernel
from .rows import GROUP
from .softmax import scale_kernel, softmax_backward_kernel, softmax_kernel, statistics_kernel
from .stacked import stacked_kernel
from .stacked_pairs import FACTS
from .tensors import (
    REAL,
    Exits,
    check_count,
    check_labels,
    check_positive,
    exits_of,
    numbers,
    on_device,
    real_of,
    tickets,
)

COUNT_LATER, COUNT_HERE, COUNTED = 0, 1, 2

LABELS_EACH = 8192  # up to so many, every program counts the batch's labels for itself
SPAN = 4096  # labels per program that counts for the others
SCALED = 4096  # elements per step of a program that scales
SCALING_PROGRAMS = 1024

# No contraction of a product and a sum: l = x - log s must use the x, as rounded, whose exponential
# q is, or near-identical exits lose the digits that the formulas keep. Said at every launch, as
# what Triton does by itself differs between versions.
EXACT = {"enable_fp_fusion": False}


def _kind(argument: Any) -> Any:
    """What a binary depends on."""
    return argument.dtype if isinstance(argument, Tensor) else type(argument)


def _groups(programs: int) -> int:
    return -(-programs // int(GROUP))


class _Layout(NamedTuple):
    """What a launch of the loss kernel reads, and how it is dealt out."""

    z: Exits  # exits first, and teachers after them
    stacked: bool
    by_pairs: bool
    plan: table.Plan
    width: int


class _Loss:
    """One call of the loss kernel."""

    def __init__(self, op: str, form: int, logits: Sequence[Tensor], given: LossArguments) -> None:
        self.given, self.form = given, form
        self.logits, first = logits, logits[0]
        self.exits, self.rows, self.classes = reference.sizes(logits)
        self.real, self.like = real_of(first), first
        check_positive(op, "temperature", given.temperature)
        self.label, self.probability = given.label, given.probabilities
        if self.probability is not None and self.probability.stride(-1) != 1:
            self.probability = self.probability.contiguous()
        check_labels(op, self.label, self.classes, given.ignore_index)
        self.divergence = given.formula

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.real, device=self.like.device)

    def gradients(self, wanted: Sequence[bool]) -> tuple[list[Tensor], tuple[Tensor | None, ...]]:
        """Fresh contiguous gradients as they are returned, and each exit's (None: not wanted)."""
        fresh = [
            torch.empty_like(z, memory_format=torch.contiguous_format) if want else None
            for z, want in zip(self.logits, wanted, strict=False)
        ]
        kept = [g for g in fresh if g is not None]
        if not kept:
            return [], (None,) * self.exits
        return kept, tuple(kept[0].unbind(0)) if kept[0].dim() == 3 else tuple(fresh)

    def layout(self, matrix: bool) -> _Layout:
        given = self.given
        # Teachers count only through a matrix of weights, or where their divergences are asked for.
        teachers = given.teacher_logits if given.pairs == "dense" or matrix else ()
        z, more = exits_of(self.logits, teachers)
        z = Exits(z.tensors + more.tensors, z.strides + more.strides, z.step)
        count = len(z.tensors)
        direct = given.detach_teacher and self.divergence in ("forward_kl", "soft_ce")
        kind = "direct" if direct or given.pairs == "none" else "general"
        double = self.real == torch.float64
        vector = min(z.step, 16 // self.like.element_size())
        by_pairs = kind == "general" or matrix or given.pairs == "dense"
        way = "by pairs" if by_pairs else "by exits"
        if table.stacks(count, self.classes, vector, kind, way, double):
            plan = table.stacked_plan(count, self.classes, way, double)
            return _Layout(z, True, by_pairs, plan, table.power_of_two(count))
        plan = table.loss_plan(count, self.classes, vector, kind, double)
        return _Layout(z, False, by_pairs, plan, table.power_of_two(self.exits))

    def counting(self, mean: bool, normalizer: Tensor | None, gradient: bool) -> int:
        """Whether rows must be counted before gradients are known, and by whom."""
        counts = self.form == SCALAR and mean and normalizer is None and self.label is not None
        if not (counts and gradient):
            return COUNT_LATER
        return COUNT_HERE if self.rows <= LABELS_EACH else COUNTED

    def sums(self, programs: int, fields: int) -> tuple[Tensor | None, ...]:
        """Scratch memory for what is added up over the batch."""
        if self.form != SCALAR:
            return None, None, None
        groups = _groups(programs)
        return (
            self.new(programs, fields),
            self.new(groups, fields, dtype=torch.float64),
            tickets(self.like, groups + 1),
        )

    def scalars(self, normalizer: Tensor | None) -> tuple[list[Any], int]:
        given = self.given
        values = (
            given.temperature,
            given.pair_scale,
            normalizer,
            given.label_smoothing if given.label_smoothing else None,
            given.beta if self.divergence == "jsd" else None,
        )
        return numbers(values, self.real, self.like)

    def constants(self, layout: _Layout, matrix: bool) -> dict[str, Any]:
        """What the kernel is compiled for, as far as the call says it."""
        given, plan = self.given, layout.plan
        divergent = given.pairs != "none" or matrix
        return {
            "FORM": self.form, "PAIRS": PAIR_CODES[given.pairs],
            "DIVERGENCE": DIVERGENCE_CODES[self.divergence] if divergent else 0,
            "DETACH": given.detach_teacher or not divergent,
            "SQUARED": given.temperature_squared, "MATRIX": matrix,
            "TARGET": 0 if given.target is None else 1 if self.label is not None else 2,
            "SMOOTH": given.label_smoothing != 0,
            "EXIT_ROWS": given.by_row[0], "PAIR_ROWS": given.by_row[1],
            "RESIDENT": plan.resident, "STEP": layout.z.step, "K": self.exits,
            "COUNT": len(layout.z.tensors), "WIDTH": layout.width, "ROWS": plan.rows,
            "BLOCK": plan.block, "REAL": REAL[self.real], "num_warps": plan.warps, **EXACT,
        }  # fmt: skip

    def run(
        self,
        gradient: tuple[Tensor | None, ...],
        outputs: Sequence[Tensor | None],
        upstream: Sequence[Tensor | None] = (None, None),
        mean: bool = False,
        normalizer: Tensor | None = None,
        matrix: bool = False,
    ) -> None:
        if self.rows == 0:
            for output in outputs:
                if output is not None:
                    output.zero_()
            return
        given, layout = self.given, self.layout(matrix)
        z, plan, count = layout.z, layout.plan, len(layout.z.tensors)
        programs = -(-self.rows // plan.rows)
        fields = 3 * self.exits + 2 + (self.exits * count if matrix else 0)
        wants_gradient = any(g is not None for g in gradient)
        counting = self.counting(mean, normalizer, wants_gradient)
        with on_device(self.like):
            sums = self.sums(programs, fields)
            counts = self.count() if counting == COUNTED else None
            in_pairs = layout.stacked and layout.by_pairs
            facts = self.new(programs, int(FACTS) * layout.width) if in_pairs else None
            scalars, pointers = self.scalars(normalizer)
            arguments = (
                z.tensors, z.strides, gradient, self.label, self.probability,
                0 if self.probability is None else self.probability.stride(0),
                given.class_weight, given.exit_weight, given.pair_weight, *upstream,
                *scalars, *outputs, counts, *sums, facts, given.ignore_index, self.rows,
                self.classes // z.step,
            )  # fmt: skip
            constants = self.constants(layout, matrix) | {
                "POINTERS": pointers, "MEAN": mean, "NORMALIZED": normalizer is not None,
                "COUNTING": counting, "GRADIENT": wants_gradient,
            }  # fmt: skip
            self.launch(layout, (programs,), arguments, constants)

    def launch(
        self, layout: _Layout, grid: tuple[int], arguments: Any, constants: dict[str, Any]
    ) -> None:
        kernel = stacked_kernel if layout.stacked else loss_kernel
        options: dict[str, int] = {}
        if registers.limited(self.like.device):
            # Absent tensors, and numbers in memory or not, are other kernels, too.
            given = (*map(_kind, arguments), *map(type, arguments[2]), *constants.values())
            key = (self.like.device, self.like.dtype, layout.z.strides, self.classes, given)
            options = registers.options(key, kernel, grid, arguments, constants, layout.plan)
        kernel[grid](*arguments, **constants, **options)

    def count(self) -> Tensor:
        """Valid rows and the sum of their class weights, by a launch of its own: in a batch this
        long, programs that each read all labels would cost more."""
        assert self.label is not None
        programs = -(-self.rows // SPAN)
        counts, sums = self.new(2), self.new(programs, 2)
        group_sums = self.new(_groups(programs), 2, dtype=torch.float64)
        count_kernel[(programs,)](
            self.label, self.given.class_weight, counts, sums, group_sums,
            tickets(self.like, _groups(programs) + 1), self.given.ignore_index, self.rows,
            self.classes, SPAN=SPAN, REAL=REAL[self.real], **EXACT,
        )  # fmt: skip
        return counts


def multi_exit_loss(logits: Sequence[Tensor], *arguments: Any) -> tuple[Any, ...]:
    *given, reduction, normalizer, matrix, gradient = arguments
    call = _Loss("multi_exit_loss", SCALAR, logits, LossArguments(*given))
    if normalizer is not None:
        check_count("multi_exit_loss", "normalizer", normalizer)
    exits, rows = call.exits, call.rows
    count = exits + len(call.given.teacher_logits)
    outputs = (
        call.new(),
        call.new(exits),
        call.new(exits),
        call.new(exits, count) if matrix else call.new(0),
        call.new(exits, rows, dtype=torch.int64),
        call.new(exits, rows),
    )
    gradients, each = call.gradients(gradient)
    written = (*outputs[:3], outputs[3] if matrix else None, *outputs[4:])
    call.run(each, written, (None, None), reduction == "mean", normalizer, bool(matrix))
    return (*outputs, gradients)


def multi_exit_row_losses(logits: Sequence[Tensor], *arguments: Any) -> tuple[Tensor, ...]:
    call = _Loss("multi_exit_row_losses", ROWS, logits, LossArguments(*arguments))
    outputs = (call.new(call.exits, call.rows), call.new(call.exits, call.rows))
    call.run((None,) * call.exits, (None, *outputs, None, None, None))
    return outputs


def multi_exit_row_losses_backward(
    grad_cross_entropy: Tensor, grad_divergence: Tensor, logits: Sequence[Tensor], *arguments: Any
) -> list[Tensor]:
    *given, gradient = arguments
    call = _Loss("multi_exit_row_losses", ROWS_BACKWARD, logits, LossArguments(*given))
    upstream = [g.to(call.real).contiguous() for g in (grad_cross_entropy, grad_divergence)]
    gradients, each = call.gradients(gradient)
    call.run(each, (None,) * 6, upstream)
    return gradients


# Softmax, statistics, scaling -----------------------------------------------------------------


class _Rows(NamedTuple):
    """The grid and the tile of a kernel that works row by row."""

    grid: tuple[int, int]
    options: dict[str, Any]


def _row_launch(z: Exits) -> _Rows:
    rows, classes = z.tensors[0].shape
    real = real_of(z.tensors[0])
    plan = table.row_plan(classes, real == torch.float64)
    options = {
        "STEP": z.step, "K": len(z.tensors), "ROWS": plan.rows, "BLOCK": plan.block,
        "REAL": REAL[real], "num_warps": plan.warps, **EXACT,
    }  # fmt: skip
    return _Rows((-(-rows // plan.rows), len(z.tensors)), options)


def _resident(z: Exits, launch: _Rows) -> bool:
    return bool(launch.options["BLOCK"] >= z.tensors[0].shape[1])


def _fresh(like: Sequence[Tensor]) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """New contiguous tensors of those shapes, and each exit's."""
    fresh = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in like]
    return fresh, tuple(fresh[0].unbind(0)) if fresh[0].dim() == 3 else tuple(fresh)


def multi_exit_softmax(logits: Sequence[Tensor], temperature: Tensor, log: bool) -> list[Tensor]:
    check_positive("multi_exit_softmax", "temperature", temperature)
    outputs, each = _fresh(logits)
    (z,) = exits_of(logits)
    rows, classes = z.tensors[0].shape
    if rows == 0:
        return outputs
    launch = _row_launch(z)
    (t,), pointers = numbers((temperature,), real_of(logits[0]), logits[0])
    with on_device(logits[0]):
        softmax_kernel[launch.grid](
            z.tensors, z.strides, each, t, rows, classes // z.step, POINTERS=pointers, LOG=log,
            RESIDENT=_resident(z, launch), **launch.options,
        )  # fmt: skip
    return outputs


def multi_exit_softmax_backward(
    gradients: Sequence[Tensor], outputs: Sequence[Tensor], temperature: Tensor, log: bool
) -> list[Tensor]:
    results, each = _fresh(outputs)
    y, g = exits_of(outputs, gradients)
    rows, classes = y.tensors[0].shape
    if rows == 0:
        return results
    launch = _row_launch(y)
    (t,), pointers = numbers((temperature,), real_of(outputs[0]), outputs[0])
    with on_device(outputs[0]):
        softmax_backward_kernel[launch.grid](
            y.tensors, y.strides, g.tensors, g.strides, each, t, rows, classes // y.step,
            POINTERS=pointers, LOG=log, RESIDENT=_resident(y, launch), **launch.options,
        )  # fmt: skip
    return results


def exit_statistics(logits: Sequence[Tensor]) -> tuple[Tensor, ...]:
    (z,) = exits_of(logits)
    rows, classes = z.tensors[0].shape
    real = real_of(logits[0])
    dtypes = (real, real, torch.int64, real, real, real)
    shape = (len(z.tensors), rows)
    outputs = tuple(torch.empty(shape, dtype=d, device=logits[0].device) for d in dtypes)
    if rows == 0:
        return outputs
    launch = _row_launch(z)
    with on_device(logits[0]):
        statistics_kernel[launch.grid](
            z.tensors, z.strides, *outputs, rows, classes // z.step, **launch.options
        )
    return outputs


def scale_(tensors: Sequence[Tensor], factor: Tensor) -> None:
    """In place; tensors are contiguous, as this executor's gradients are."""
    real = real_of(tensors[0])
    (f,), pointers = numbers((factor,), real, tensors[0])
    if f == 1.0 if not pointers else tensors[0].numel() == 0:
        return
    sizes = {t.numel() for t in tensors}
    with on_device(tensors[0]):
        for size in sorted(sizes):
            data = tuple(t for t in tensors if t.numel() == size)
            blocks = -(-size // SCALED)
            scale_kernel[(min(blocks, SCALING_PROGRAMS), len(data))](
                data, f, size, POINTER=bool(pointers), K=len(data), BLOCK=SCALED, REAL=REAL[real],
                num_warps=4, **EXACT,
            )  # fmt: skip

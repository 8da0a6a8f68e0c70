# SPDX-License-Identifier: Apache-2.0
"""The derivatives: one Function per differentiable op, outside the registered ops.

The scalar loss computes its gradient in forward, while the row set is in cache; backward scales
that buffer by the upstream gradient and hands it out once. A later backward recomputes it from
the saved logits, so nothing handed out is ever written again. float16 gradients are computed in
backward only: rounded before a loss scale arrives, 1 / N would leave them subnormal. Functions
whose outputs have a row each save the logits and recompute. None can be differentiated twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from msdkern.executors import VALUES, call


def _refuse_second_order(op: str) -> None:
    # Grad mode is on inside a backward exactly when it was asked to build a graph of itself.
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"{op}: second-order gradients are not implemented; got create_graph=True"
        )


def _wants_gradient(logits: list[Tensor]) -> bool:
    # Inside forward-mode differentiation it is the Function that refuses; the op would drop
    # tangents without a word.
    if not torch.is_grad_enabled():
        return False
    if forward_ad._current_level >= 0:
        return True
    for z in logits:  # noqa: SIM110 (a generator costs more than it finds)
        if z.requires_grad:
            return True
    return False


def _versions(teachers: Sequence[Tensor], *others: Any) -> list[tuple[Tensor, int]]:
    """Teachers, targets, weights and temperature as they are now. `save_for_backward` would also
    keep watch, but refuses tensors made in inference mode, as a teacher's logits may be.
    """
    return [
        (v, v._version)
        for v in (*teachers, *others)
        if type(v) not in VALUES and isinstance(v, Tensor) and not v.is_inference()
    ]


def _check_versions(op: str, kept: list[tuple[Tensor, int]]) -> None:
    if any(tensor._version != version for tensor, version in kept):
        raise RuntimeError(f"{op}: an argument was changed in place between forward and backward")


def _spread(gradients: list[Tensor], wanted: tuple[bool, ...]) -> list[Tensor | None]:
    """Gradients of the inputs that want one, None for the others."""
    if all(wanted):
        return list(gradients)
    rest = iter(gradients)
    return [next(rest) if want else None for want in wanted]


def _ready_in_forward(logits: Sequence[Tensor]) -> bool:
    return logits[0].dtype != torch.float16


def _gradients(
    logits: Sequence[Tensor], rest: tuple[Any, ...], wanted: Sequence[bool], upstream: Tensor
) -> list[Tensor]:
    """The gradients times the upstream factor, from the logits."""
    teachers, target, exit_weight, pairs, pair_weight, pair_scale, *others, executor = rest
    exits = len(logits) if logits[0].dim() == 2 else logits[0].shape[0]
    exit_weight = upstream.expand(exits) if exit_weight is None else exit_weight * upstream
    inputs = (teachers, target, exit_weight.contiguous(), pairs, pair_weight)
    *_, gradients = call(
        "multi_exit_loss",
        [z.detach() for z in logits],
        *inputs,
        pair_scale * upstream,
        *others,
        wanted,
        executor,
    )
    return gradients


class _MultiExitLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rest: tuple[Any, ...], report: list[Tensor], *logits: Tensor) -> Tensor:
        # The detached outputs leave through `report`: as outputs of the Function each would cost
        # as much again as the loss.
        ctx.wanted = wanted = ctx.needs_input_grad[2:]
        ready = _ready_in_forward(logits)
        loss, *values, gradients = call(
            "multi_exit_loss", logits, *rest[:-1], wanted if ready else (), rest[-1]
        )
        report += values
        ctx.rest, ctx.gradients = rest, gradients if ready else None
        ctx.versions = _versions(*rest)
        ctx.save_for_backward(*logits)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        _refuse_second_order("multi_exit_loss")
        rest, wanted = ctx.rest, ctx.wanted
        logits = ctx.saved_tensors  # also raises if they were changed in place since
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            _check_versions("multi_exit_loss", ctx.versions)
            gradients = _gradients(logits, rest, wanted, upstream)
        else:
            call("scale_", gradients, upstream, rest[-1])
        return (None, None, *_spread(gradients, wanted))


class _TracedMultiExitLoss(torch.autograd.Function):
    """The same under torch.compile: no state, and the scaling is left to the compiler to fuse."""

    @staticmethod
    def forward(ctx: Any, count: int, *inputs: Any) -> tuple[Tensor, ...]:
        logits, rest = inputs[:count], inputs[count:]
        wanted = [z.requires_grad for z in logits]
        ready = _ready_in_forward(logits)
        *values, gradients = call(
            "multi_exit_loss", list(logits), *rest[:-1], wanted if ready else [], rest[-1]
        )
        ctx.wanted, ctx.rest, ctx.ready = tuple(wanted), rest, ready
        ctx.save_for_backward(*(gradients if ready else logits))
        ctx.mark_non_differentiable(*values[1:])
        return tuple(values)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *unused: Any) -> tuple[Any, ...]:
        if ctx.ready:
            gradients = [(g.to(upstream.dtype) * upstream).to(g.dtype) for g in ctx.saved_tensors]
        else:
            gradients = _gradients(ctx.saved_tensors, ctx.rest, list(ctx.wanted), upstream)
        return (None, *_spread(gradients, ctx.wanted), *(None,) * len(ctx.rest))


def multi_exit_loss(logits: list[Tensor], *rest: Any) -> tuple[Tensor, ...]:
    """The op with its gradient. `rest` is the schema's order, less `gradient`."""
    if not _wants_gradient(logits):
        return call("multi_exit_loss", logits, *rest[:-1], [], rest[-1])[:-1]
    if torch.compiler.is_compiling():
        return _TracedMultiExitLoss.apply(len(logits), *logits, *rest)
    report: list[Tensor] = []
    return (_MultiExitLoss.apply(rest, report, *logits), *report)


class _RowLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, count: int, *inputs: Any) -> tuple[Tensor, Tensor]:
        logits, rest = inputs[:count], inputs[count:]
        outputs = call("multi_exit_row_losses", list(logits), *rest)
        ctx.wanted, ctx.rest = tuple(z.requires_grad for z in logits), rest
        ctx.versions = [] if torch.compiler.is_compiling() else _versions(*rest)
        ctx.save_for_backward(*logits)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, grad_ce: Tensor, grad_divergence: Tensor) -> tuple[Any, ...]:
        _refuse_second_order("multi_exit_row_losses")
        _check_versions("multi_exit_row_losses", ctx.versions)
        logits, rest = list(ctx.saved_tensors), ctx.rest
        gradients = call(
            "multi_exit_row_losses_backward",
            grad_ce,
            grad_divergence,
            logits,
            *rest[:-1],
            list(ctx.wanted),
            rest[-1],
        )
        return (None, *_spread(gradients, ctx.wanted), *(None,) * len(rest))


def multi_exit_row_losses(logits: list[Tensor], *rest: Any) -> tuple[Tensor, Tensor]:
    """The op with its gradient. `rest` is the schema's order."""
    if not _wants_gradient(logits):
        return call("multi_exit_row_losses", logits, *rest)
    return _RowLosses.apply(len(logits), *logits, *rest)


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, temperature: Tensor, log: bool, executor: str, *logits: Tensor
    ) -> tuple[Tensor, ...]:
        outputs = call("multi_exit_softmax", list(logits), temperature, log, executor)
        ctx.arguments, ctx.wanted = (temperature, log, executor), ctx.needs_input_grad[3:]
        ctx.versions = [] if torch.compiler.is_compiling() else _versions((), temperature)
        ctx.save_for_backward(*outputs)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Any, ...]:
        _refuse_second_order("multi_exit_softmax")
        _check_versions("multi_exit_softmax", ctx.versions)
        gradients = call(
            "multi_exit_softmax_backward", list(upstream), list(ctx.saved_tensors), *ctx.arguments
        )
        kept = [g if want else None for g, want in zip(gradients, ctx.wanted, strict=True)]
        return (None, None, None, *kept)


def multi_exit_softmax(
    logits: list[Tensor], temperature: Tensor, log: bool, executor: str
) -> tuple[Tensor, ...] | list[Tensor]:
    """The op with its gradient."""
    if not _wants_gradient(logits):
        return call("multi_exit_softmax", logits, temperature, log, executor)
    return _Softmax.apply(temperature, log, executor, *logits)

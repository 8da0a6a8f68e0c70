# SPDX-License-Identifier: Apache-2.0
"""The floor: what nothing can beat that reads the logits and writes results of their size.

`copy` goes through the same autograd machinery as every other contender and computes nothing in
between, so "percent of copy" already contains what PyTorch itself charges for a call.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .problem import Problem


class CopyLoss(torch.autograd.Function):
    """Forward reads K logits and writes K gradients of that size; backward hands them out."""

    @staticmethod
    def forward(ctx, *logits: Tensor) -> Tensor:  # type: ignore[override]
        ctx.gradients = _copies(logits)
        return logits[0].new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        gradients, ctx.gradients = ctx.gradients, None
        return tuple(gradients)


class CopySoftmax(torch.autograd.Function):
    """Forward writes K outputs; backward reads outputs and upstream gradients and writes again."""

    @staticmethod
    def forward(ctx, *logits: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        outputs = tuple(_copies(logits))
        ctx.save_for_backward(*outputs)
        return outputs

    @staticmethod
    def backward(ctx, *upstream: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return tuple(torch.mul(y, g) for y, g in zip(ctx.saved_tensors, upstream, strict=True))


def _copies(logits: Sequence[Tensor]) -> list[Tensor]:
    return [z.clone() for z in logits]


def train(problem: Problem) -> Tensor | tuple[Tensor, ...]:
    """The floor of a forward pass that a backward pass follows."""
    kind = CopySoftmax if problem.case.family == "softmax" else CopyLoss
    return kind.apply(*problem.logits)


def infer(problem: Problem) -> object:
    """The floor of a forward pass alone: softmax writes its results, the others only read."""
    if problem.case.family == "softmax":
        return _copies(problem.logits)
    return [z.sum() for z in problem.logits]

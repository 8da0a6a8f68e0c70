# SPDX-License-Identifier: Apache-2.0
"""What every form of the loss is called with, and the numbers that kernels know the choices by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

PAIR_CODES = {"none": 0, "mutual": 1, "last": 2, "deeper": 3, "next": 4, "dense": 5}
DIVERGENCE_CODES = {"forward_kl": 0, "reverse_kl": 1, "jsd": 2, "soft_ce": 3}
SCALAR, ROWS, ROWS_BACKWARD = 0, 1, 2  # the forms


class LossArguments(NamedTuple):
    """Checked, in the schema's order after the logits; meanings as in `multi_exit_loss`."""

    teacher_logits: Sequence[Tensor]
    target: Tensor | None
    exit_weight: Tensor | None
    pairs: str
    pair_weight: Tensor | None
    pair_scale: Tensor
    temperature: Tensor
    temperature_squared: bool
    divergence: str
    beta: float
    detach_teacher: bool
    class_weight: Tensor | None
    ignore_index: int
    label_smoothing: float

    @property
    def formula(self) -> str:
        """The divergence to compute: a Jensen-Shannon mixture of one side alone is a KL."""
        if self.divergence == "jsd" and self.beta in (0.0, 1.0):
            return "reverse_kl" if self.beta else "forward_kl"
        return self.divergence

    @property
    def label(self) -> Tensor | None:
        """The target, where it is class indices."""
        target = self.target
        if target is None or target.dtype != torch.int64:
            return None
        return target.contiguous()

    @property
    def probabilities(self) -> Tensor | None:
        """The target, where it is class probabilities."""
        target = self.target
        return target if target is not None and target.is_floating_point() else None

    @property
    def by_row(self) -> tuple[bool, bool]:
        """Whether the weights of exits, and those of pairs, are given row by row."""
        exits, pairs = self.exit_weight, self.pair_weight
        return exits is not None and exits.dim() == 2, pairs is not None and pairs.dim() == 3

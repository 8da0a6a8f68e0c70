# SPDX-License-Identifier: Apache-2.0
"""Decoupled knowledge distillation: the target class and the rest are distilled apart."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from msdkern import ops
from msdkern.nn.losses import MultiExitLoss, Number
from msdkern.reference import reciprocal


class DKDLoss(MultiExitLoss):
    """Decoupled KD of every exit from one external teacher (Zhao et al. 2022, 2203.08679).

    ::

        L = sum_k [ CE_k + w T^2 ( alpha KL(b_t || b_k) + beta KL(r_t || r_k) ) ]

    With q = softmax(z / T) and label y: b = (q[y], 1 - q[y]), and r = q without y, renormalised.
    Since KL(q_t || q_k) = KL(b_t || b_k) + (1 - q_t[y]) KL(r_t || r_k), alpha = beta = 1 weighs
    the second part more than plain KD does. Both parts are divergences of `msdkern`: of two
    logits (label, log-sum-exp of the rest), and of the logits with the label masked.

    Args:
        alpha, beta: weights of the target part and of the rest.
        temperature: T > 0, a number or a 0-d tensor.
        warmup: w rises linearly to 1 until this progress (`set_progress`); 0: always 1. The
            paper's code warms up over 20 of 240 epochs.
        options: of `MultiExitLoss`, for the cross entropies.

    Needs int64 labels, C > 2 (with two classes the rest is one class and says nothing) and
    ``teacher_logits=[z_t]``. Ignored rows add nothing. The exits receive the gradient, the
    teacher none.
    """

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 8.0,
        temperature: Number = 4.0,
        warmup: float = 0.0,
        **options: Any,
    ) -> None:
        schedule = partial(_warmed, length=warmup)
        settings: dict[str, Any] = {"schedule": schedule, **schedule(0.0), **options}
        super().__init__(temperature=temperature, **settings)
        self.alpha = alpha
        self.beta = beta
        self.needs_teacher = True

    def forward(
        self,
        logits: Sequence[Tensor] | Tensor,
        target: Tensor | None = None,
        features: Sequence[Tensor] | None = None,
        teacher_logits: Sequence[Tensor] | Tensor | None = None,
        *,
        normalizer: Number | None = None,
        exit_weight: Tensor | None = None,
    ) -> Tensor:
        """As `MultiExitLoss.forward`; raises ValueError without labels or with C < 3."""
        logits, teachers = self._with_teachers(logits, teacher_logits)
        z = logits[-1]
        if z.shape[1] < 3:
            raise ValueError(f"DKDLoss: there must be at least 3 classes; got {z.shape[1]}")
        if target is None or target.dim() != 1 or len(teachers) != 1:
            rule = "DKDLoss: target must be int64 [N] and teacher_logits one tensor"
            raise ValueError(f"{rule}; got {len(teachers)} teachers and target {target!r:.40}")
        loss = super().forward(
            logits, target, features, teachers, normalizer=normalizer, exit_weight=exit_weight
        )
        valid = target != self.ignore_index
        divergence = self._divergence(logits, teachers[0], target, valid)
        total = loss + divergence.sum() * self._per_row(valid, normalizer)
        mean = divergence.detach().sum(1) / valid.sum().clamp(min=1)
        self.terms = {**self.terms, "loss": total.detach(), "divergence": mean}
        return total

    def _per_row(self, valid: Tensor, normalizer: Number | None) -> Tensor | float:
        if normalizer is not None:
            return reciprocal(torch.as_tensor(normalizer, device=valid.device).float())
        return 1.0 if self.options["reduction"] == "sum" else reciprocal(valid.sum().float())

    def _divergence(
        self, logits: Sequence[Tensor] | Tensor, teacher: Tensor, target: Tensor, valid: Tensor
    ) -> Tensor:
        """w T^2 (alpha KL(b_t || b_k) + beta KL(r_t || r_k)), [K, N], 0 on ignored rows."""
        one_hot = F.one_hot(torch.where(valid, target, 0), teacher.shape[1]).bool()
        rest = [z.masked_fill(one_hot, -torch.inf) for z in [*logits, teacher]]
        pairs = [
            self._label_and_rest(z, r, one_hot)
            for z, r in zip([*logits, teacher], rest, strict=True)
        ]
        total = self.alpha * self._rows(pairs) + self.beta * self._rows(rest)
        return torch.where(valid, self.pair_scale.to(total.device) * total, 0.0)

    def _label_and_rest(self, z: Tensor, rest: Tensor, one_hot: Tensor) -> Tensor:
        """Two logits [N, 2] whose softmax at T is (q[y], 1 - q[y])."""
        temperature = self._temperature.to(z.device)
        label = z.masked_fill(~one_hot, 0.0).sum(1)
        others = temperature * torch.logsumexp(rest / temperature, dim=1)
        return torch.stack([label, others.to(label.dtype)], dim=1)

    def _rows(self, logits: list[Tensor]) -> Tensor:
        """T^2 KL(teacher || exit) of every exit and row; the last of the logits is the teacher."""
        *exits, teacher = logits
        weight = torch.zeros(len(exits), len(exits) + 1, device=teacher.device)
        weight[:, -1] = 1.0
        return ops.multi_exit_row_losses(
            exits,
            pair_weight=weight,
            teacher_logits=[teacher],
            temperature=self._temperature,
            temperature_squared=self.options["temperature_squared"],
        ).divergence


def _warmed(progress: float, length: float) -> dict[str, float]:
    return {"pair_scale": min(progress / length, 1.0) if length > 0.0 else 1.0}

# SPDX-License-Identifier: Apache-2.0
"""Executor `eager`: the formulas of msdkern/reference.py, with the gradients in closed form.

Runs wherever PyTorch runs, in any build of it. It is the truth the other executors are tested
against, and what serves when no kernel can.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from msdkern import reference
from msdkern.executors import rules
from msdkern.executors.arguments import LossArguments


def reason() -> str | None:
    return None


def _unstack(logits: Sequence[Tensor]) -> list[Tensor]:
    return list(logits[0].unbind(0)) if logits[0].dim() == 3 else list(logits)


def _check(rule: Callable[..., None], op: str, value: Tensor | None, *given: Any) -> None:
    """One of rules.py, where reading the value needs no synchronisation with a GPU."""
    if value is not None and value.device.type == "cpu":
        rule(op, value, *given)


class _Rows:
    """The per-row terms of (3) of one call."""

    def __init__(
        self,
        op: str,
        logits: Sequence[Tensor],
        given: LossArguments,
    ) -> None:
        self.logits = z = _unstack(logits)
        self.stacked = logits[0].dim() == 3
        self.given, self.teachers, self.target = given, given.teacher_logits, given.target
        rows, classes = z[0].shape
        _check(rules.positive, op, given.temperature, "temperature")
        _check(rules.labels, op, given.label, classes, given.ignore_index)
        like = torch.empty((), dtype=reference.accumulation_dtype(z[0].dtype), device=z[0].device)
        self.temperature = given.temperature.to(like)
        self.scale = given.pair_scale.to(like)
        if given.temperature_squared:
            self.scale = self.scale * self.temperature.square()
        self.divergence = (given.divergence, given.beta, given.detach_teacher)
        weight = like.new_ones(1, 1) if given.exit_weight is None else given.exit_weight
        self.exit_weight = weight.reshape(weight.shape[0], -1)
        self.weight = self._weights(given.pairs, given.pair_weight, like)
        self.valid = reference.valid_rows(given.target, rows, given.ignore_index, like)

    def _weights(self, pairs: str, pair_weight: Tensor | None, like: Tensor) -> Tensor:
        """W as [K, K + E, N] or [K, K + E, 1]; `wanted` tells which pairs count at all."""
        if pair_weight is None:
            matrix = reference.pair_weight_matrix(pairs, len(self.logits))
            self.wanted = [[w != 0 for w in row] + [False] * len(self.teachers) for row in matrix]
            pair_weight = torch.tensor(matrix, dtype=like.dtype, device=like.device)
            pair_weight = torch.nn.functional.pad(pair_weight, (0, len(self.teachers)))
        else:
            self.wanted = [[True] * pair_weight.shape[1]] * pair_weight.shape[0]
        return pair_weight if pair_weight.dim() == 3 else pair_weight.unsqueeze(-1)

    def cross_entropy(self) -> Tensor:
        """CE_k[n], 0 on ignored rows: [K, N]."""
        if self.target is None:
            return self.valid.new_zeros(len(self.logits), len(self.valid))
        given = self.given
        options = (given.class_weight, given.ignore_index, given.label_smoothing)
        return torch.stack([reference.cross_entropy(z, self.target, *options) for z in self.logits])

    def divergences(self, every_pair: bool = False) -> Tensor:
        """D_ij[n], 0 on ignored rows: [K, K + E, N]. Pairs without weight are left 0."""
        wanted = [[every_pair or w for w in row] for row in self.wanted]
        matrix = reference.divergence_matrix(
            self.logits, self.teachers, self.temperature, *self.divergence, wanted
        )
        # where(), not a product: an ignored row stays 0 also where its terms are not finite.
        return torch.where(self.valid > 0, matrix, 0.0)

    def weighted(self, divergences: Tensor) -> Tensor:
        """s sum_j W_ij[n] D_ij[n]: [K, N]."""
        return self.scale * reference.weigh(self.weight, divergences).sum(1)

    def gradients(self, of_ce: Tensor, of_divergence: Tensor, wanted: Sequence[bool]) -> list:
        """dL/dz for upstream gradients [K, N] of a_k CE_k and of s sum_j W_ij D_ij."""
        coefficient = (of_divergence * self.scale).unsqueeze(1) * self.weight
        result = reference.divergence_gradients(
            self.logits, self.teachers, self.temperature, *self.divergence, coefficient,
            self.wanted,
        )  # fmt: skip
        if self.target is not None:
            options = (self.given.class_weight, self.given.label_smoothing)
            of_ce = of_ce * self.exit_weight
            for k, z in enumerate(self.logits):
                g = reference.cross_entropy_gradient(z, self.target, *options)
                result[k] = result[k] + reference.weigh(of_ce[k].unsqueeze(-1), g)
        keep = (self.valid > 0).unsqueeze(-1)
        result = [torch.where(keep, g, 0.0).to(self.logits[0].dtype) for g in result]
        if self.stacked:
            return [torch.stack(result)]
        return [g for g, want in zip(result, wanted, strict=True) if want]


def multi_exit_loss(logits: Sequence[Tensor], *arguments: Any) -> tuple[Any, ...]:
    *row_arguments, reduction, normalizer, pair_divergence, gradient = arguments
    rows = _Rows("multi_exit_loss", logits, LossArguments(*row_arguments))
    ce, divergences = rows.cross_entropy(), rows.divergences(pair_divergence)
    weighted = rows.weighted(divergences)
    mean_ce, mean_rows = reference.mean_factors(
        rows.target, rows.valid, rows.given.class_weight, rows.given.ignore_index
    )
    one = torch.ones_like(mean_ce)
    r_ce, r_rows = (mean_ce, mean_rows) if reduction == "mean" else (one, one)
    if normalizer is not None:
        _check(rules.not_negative, "multi_exit_loss", normalizer, "normalizer")
        r_ce = r_rows = reference.reciprocal(normalizer.to(one))
    statistics = [reference.statistics(z) for z in rows.logits]
    upstream = (r_ce.expand_as(ce), r_rows.expand_as(ce))
    return (
        (r_ce * rows.exit_weight * ce).sum() + (r_rows * weighted).sum(),
        (mean_ce * ce).sum(-1),
        (mean_rows * weighted).sum(-1),
        (mean_rows * divergences).sum(-1) if pair_divergence else ce.new_empty(0),
        torch.stack([s[2] for s in statistics]),
        torch.stack([s[1] for s in statistics]),
        rows.gradients(*upstream, gradient) if any(gradient) else [],
    )


def multi_exit_row_losses(logits: Sequence[Tensor], *arguments: Any) -> tuple[Tensor, ...]:
    rows = _Rows("multi_exit_row_losses", logits, LossArguments(*arguments))
    return rows.exit_weight * rows.cross_entropy(), rows.weighted(rows.divergences())


def multi_exit_row_losses_backward(
    grad_cross_entropy: Tensor, grad_divergence: Tensor, logits: Sequence[Tensor], *arguments: Any
) -> list[Tensor]:
    *row_arguments, gradient = arguments
    rows = _Rows("multi_exit_row_losses", logits, LossArguments(*row_arguments))
    return rows.gradients(grad_cross_entropy, grad_divergence, gradient)


def multi_exit_softmax(logits: Sequence[Tensor], temperature: Tensor, log: bool) -> list[Tensor]:
    _check(rules.positive, "multi_exit_softmax", temperature, "temperature")
    result = []
    for z in logits:
        log_p = reference.log_softmax(z, temperature.to(z.device))
        result.append((log_p if log else log_p.exp()).to(z.dtype).contiguous())
    return result


def multi_exit_softmax_backward(
    gradients: Sequence[Tensor], outputs: Sequence[Tensor], temperature: Tensor, log: bool
) -> list[Tensor]:
    """softmax: p (g - sum_c g p) / T. log_softmax: (g - p sum_c g) / T."""
    result = []
    for g, y in zip(gradients, outputs, strict=True):
        dtype = reference.accumulation_dtype(y.dtype)
        g, y = g.to(dtype), y.to(dtype)
        if log:
            z = g - y.exp() * g.sum(-1, keepdim=True)
        else:
            z = y * (g - (g * y).sum(-1, keepdim=True))
        result.append((z / temperature.to(z)).to(outputs[0].dtype).contiguous())
    return result


def exit_statistics(logits: Sequence[Tensor]) -> tuple[Tensor, ...]:
    columns = zip(*(reference.statistics(z) for z in _unstack(logits)), strict=True)
    return tuple(torch.stack(column) for column in columns)


def _per_exit(value: Tensor, k: int, like: Tensor) -> Tensor:
    """A number for exit k. On another device than the logits, a 0-d CPU tensor needs no copy."""
    value = value if value.dim() == 0 else value[k]
    return value.to(reference.accumulation_dtype(like.dtype))


def _score(
    z: Tensor,
    measure: str,
    temperature: Tensor,
    given: Tensor | None,
    previous: tuple[Tensor, Tensor] | tuple[None, None],
) -> tuple[Tensor, Tensor]:
    """Prediction and score of one exit."""
    prediction, dtype = z.argmax(-1), reference.accumulation_dtype(z.dtype)
    if given is not None:
        return prediction, given.clone()
    if measure == "patience":
        return prediction, reference.agreement(prediction, *previous).to(dtype)
    return prediction, reference.gate_score(z, temperature, measure)


def exit_gate(
    logits: Sequence[Tensor],
    threshold: Tensor,
    measure: str,
    temperature: Tensor,
    score: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(rules.threshold, "exit_gate", threshold)
    _check(rules.positive, "exit_gate", temperature, "temperature")
    return unchecked_exit_gate(logits, threshold, measure, temperature, score)


def unchecked_exit_gate(
    logits: Sequence[Tensor],
    threshold: Tensor,
    measure: str,
    temperature: Tensor,
    score: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The formulas alone, which can be traced: what an exported program holds."""
    previous: Any = (None, None)
    columns, fired = [], []
    for k, z in enumerate(_unstack(logits)):
        given = None if score is None else score[k]
        previous = _score(z, measure, _per_exit(temperature, k, z), given, previous)
        columns.append(previous)
        fired.append(reference.fires(previous[1], _per_exit(threshold, k, z), measure))
    index = reference.first_fire(torch.stack(fired))
    prediction, found = (
        torch.stack(c).gather(0, index[None])[0] for c in zip(*columns, strict=True)
    )
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
    _check(rules.threshold, "gate_step", threshold)
    _check(rules.positive, "gate_step", temperature, "temperature")
    given = (score, previous_prediction, previous_score, live)
    return unchecked_gate_step(logits, threshold, measure, temperature, *given)


def unchecked_gate_step(
    logits: Tensor,
    threshold: Tensor,
    measure: str,
    temperature: Tensor,
    score: Tensor | None,
    previous_prediction: Tensor | None,
    previous_score: Tensor | None,
    live: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The formulas alone, which can be traced."""
    previous: Any = (previous_prediction, previous_score)
    t = _per_exit(temperature, 0, logits)
    prediction, found = _score(logits, measure, t, score, previous)
    stays = ~reference.fires(found, _per_exit(threshold, 0, logits), measure)
    if live is not None:
        alive = torch.arange(logits.shape[0], device=logits.device) < live
        prediction = torch.where(alive, prediction, -1)
        found, stays = torch.where(alive, found, torch.nan), stays & alive
    return prediction, found, *reference.partition(stays)


def compact_rows(
    x: Sequence[Tensor], stay: Tensor, count: Tensor | None, capacity: int
) -> list[Tensor]:
    _check(rules.rows_exist, "compact_rows", stay, count, capacity, x[0].shape[0])
    index, kept = stay[:capacity], None
    if count is not None:
        kept = torch.arange(capacity, device=stay.device) < count
        index = torch.where(kept, index, 0)
    result = []
    for t in x:
        if t.shape[0] == 0:
            t = t.new_zeros((1, *t.shape[1:]))
        rows = t.index_select(0, index)
        if kept is not None:
            rows = torch.where(kept.view(-1, *[1] * (t.dim() - 1)), rows, torch.zeros_like(rows))
        result.append(rows.contiguous(memory_format=reference.row_format(t)))
    return result


def scatter_rows(
    out: Sequence[Tensor], values: Sequence[Tensor], index: Tensor, count: Tensor | None
) -> None:
    rows = values[0].shape[0]
    _check(rules.rows_exist, "scatter_rows", index, count, rows, out[0].shape[0])
    for t, v in zip(out, values, strict=True):
        if count is None:
            t.index_copy_(0, index[:rows], v)
        else:
            t.copy_(reference.scatter_rows(t, v, index[:rows], count))


def scale_(tensors: Sequence[Tensor], factor: Tensor) -> None:
    for t in tensors:
        t.mul_(factor)

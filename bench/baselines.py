# SPDX-License-Identifier: Apache-2.0
"""What msdkern is measured against: the same results as people write them in PyTorch.

Every formulation of the loss computes formula (3) of `msdkern/reference.py` for forward KL,
teachers detached, T^2 on, mean over rows:

    L = sum_k mean_n CE_k[n] + T^2 sum_ij W_ij mean_n KL(q_j || q_i)

and, like those of the other families, takes `(recipe, logits, target, teachers)`. They differ only
in how much work they share, so that `torch.compile` is given several chances; the best one per case
is the one to beat. Pair weights are Python numbers, which lets the compiler fold them.
Low-precision logits are read as float32, as autocast does for every op used here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Recipe(NamedTuple):
    """The numbers of one case that a formulation may treat as constants."""

    weights: tuple[tuple[float, ...], ...]  # [K][K+E], student by teacher
    pair: str  # the name of the weights: a structure that a formulation may exploit
    temperature: float


Formulation = Callable[
    [Recipe, Sequence[Tensor], Tensor, Sequence[Tensor]], Tensor | tuple[Tensor, ...]
]


def _cross_entropy(logits: Sequence[Tensor], target: Tensor) -> Tensor:
    return torch.stack([F.cross_entropy(z.float(), target) for z in logits]).sum()


def pairwise(
    recipe: Recipe, logits: Sequence[Tensor], target: Tensor, teachers: Sequence[Tensor]
) -> Tensor:
    """One `F.kl_div` per pair with its own two softmaxes: how the loss is usually written."""
    t = recipe.temperature
    everyone = [*logits, *teachers]
    loss = sum(F.cross_entropy(z.float(), target) for z in logits)
    for i, student in enumerate(logits):
        for j, weight in enumerate(recipe.weights[i]):
            if weight:
                log_q = F.log_softmax(student.float() / t, dim=1)
                q = F.softmax(everyone[j].detach().float() / t, dim=1)
                loss = loss + weight * t * t * F.kl_div(log_q, q, reduction="batchmean")
    return loss  # type: ignore[return-value]


def shared(
    recipe: Recipe, logits: Sequence[Tensor], target: Tensor, teachers: Sequence[Tensor]
) -> Tensor:
    """Log-probabilities once per exit, one `F.kl_div` per pair."""
    t = recipe.temperature
    log_q = [F.log_softmax(z.float() / t, dim=1) for z in (*logits, *teachers)]
    detached = [x.detach() for x in log_q]
    loss = _cross_entropy(logits, target)
    for i, row in enumerate(recipe.weights):
        for j, weight in enumerate(row):
            if weight:
                term = F.kl_div(log_q[i], detached[j], reduction="batchmean", log_target=True)
                loss = loss + weight * t * t * term
    return loss


def _mixtures(recipe: Recipe, q: Sequence[Tensor]) -> list[Tensor | None]:
    """sum_j W_ij q_j for every student i, in O(K) where the weights allow it."""
    exits = len(recipe.weights)
    if recipe.pair == "mutual" and exits > 1:
        everyone = q[0]
        for x in q[1:]:
            everyone = everyone + x
        return [(everyone - q[i]) * recipe.weights[i][i - 1] for i in range(exits)]
    return [_weighted_sum(row, q) for row in recipe.weights]


def _weighted_sum(row: Sequence[float], q: Sequence[Tensor]) -> Tensor | None:
    total = None
    for weight, x in zip(row, q, strict=True):
        if weight:
            total = weight * x if total is None else total + weight * x
    return total


def _column_sums(recipe: Recipe) -> list[float]:
    return [sum(column) for column in zip(*recipe.weights, strict=True)]


def mean_teacher(
    recipe: Recipe, logits: Sequence[Tensor], target: Tensor, teachers: Sequence[Tensor]
) -> Tensor:
    """Every student against the weighted sum of its teachers (S - q_i when mutual)."""
    t = recipe.temperature
    log_q = [F.log_softmax(z.float() / t, dim=1) for z in (*logits, *teachers)]
    fixed = [x.detach() for x in log_q]
    q = [x.exp() for x in fixed]
    loss = _cross_entropy(logits, target)
    scale = t * t / target.shape[0]
    for weight, probability, log in zip(_column_sums(recipe), q, fixed, strict=True):
        if weight:
            loss = loss + scale * weight * (probability * log).sum()
    for mixture, log in zip(_mixtures(recipe, q), log_q, strict=False):
        if mixture is not None:
            loss = loss - scale * (mixture * log).sum()
    return loss


def gram(
    recipe: Recipe, logits: Sequence[Tensor], target: Tensor, teachers: Sequence[Tensor]
) -> Tensor:
    """Straight from logits and log-sum-exps; the label's logit by a mask, not by a gather."""
    t = recipe.temperature
    z = [x.float() for x in (*logits, *teachers)]
    u = [x / t for x in z]
    lse = [torch.logsumexp(x, dim=1) for x in u]
    q = [(x - s[:, None]).exp().detach() for x, s in zip(u, lse, strict=True)]
    label = target[:, None] == torch.arange(z[0].shape[1], device=target.device)
    rows = torch.zeros_like(lse[0])
    for x in z[: len(logits)]:
        rows = rows + torch.logsumexp(x, dim=1) - torch.where(label, x, 0.0).sum(1)
    for weight, probability, x, s in zip(_column_sums(recipe), q, u, lse, strict=True):
        if weight:
            rows = rows + t * t * weight * ((probability * x).sum(1) - s).detach()
    for i, mixture in enumerate(_mixtures(recipe, q)):
        if mixture is not None:
            total = sum(recipe.weights[i])
            rows = rows + t * t * (total * lse[i] - (mixture * u[i]).sum(1))
    return rows.mean()


class _ClosedForm(torch.autograd.Function):
    """Formula (6) written out: the gradient beside the value, so that one graph computes both."""

    @staticmethod
    def forward(ctx, recipe: Recipe, target: Tensor, *everyone: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        t, exits, rows = recipe.temperature, len(recipe.weights), target.shape[0]
        z = [x.float() for x in everyone]
        log_q = [F.log_softmax(x / t, dim=1) for x in z]
        q = [x.exp() for x in log_q]
        label = target[:, None] == torch.arange(z[0].shape[1], device=target.device)
        loss = t * t * _entropies(recipe, q, log_q)
        gradients = []
        for i, mixture in enumerate(_mixtures(recipe, q)):
            log_p = F.log_softmax(z[i], dim=1)
            loss = loss - torch.where(label, log_p, 0.0).sum()
            gradient = log_p.exp() - label.float()
            if mixture is not None:
                loss = loss - t * t * (mixture * log_q[i]).sum()
                gradient = gradient + t * (sum(recipe.weights[i]) * q[i] - mixture)
            gradients.append((gradient / rows).to(everyone[i].dtype))
        ctx.save_for_backward(*gradients)
        ctx.others = len(everyone) - exits
        return loss / rows

    @staticmethod
    def backward(ctx, upstream: Tensor):  # type: ignore[no-untyped-def]
        gradients = [(g * upstream).to(g.dtype) for g in ctx.saved_tensors]
        return None, None, *gradients, *[None] * ctx.others


def _entropies(recipe: Recipe, q: Sequence[Tensor], log_q: Sequence[Tensor]) -> Tensor:
    """sum_ij W_ij sum q_j log q_j, the part of the divergences that only the teachers see."""
    pairs = zip(_column_sums(recipe), q, log_q, strict=True)
    return sum(w * (p * log).sum() for w, p, log in pairs if w)  # type: ignore[return-value]


def closed_form(
    recipe: Recipe, logits: Sequence[Tensor], target: Tensor, teachers: Sequence[Tensor]
) -> Tensor:
    """The gradient by hand, in the forward pass: what an expert would give to the compiler."""
    return _ClosedForm.apply(recipe, target, *logits, *teachers)


def stacked(
    recipe: Recipe, logits: Sequence[Tensor], target: Tensor, teachers: Sequence[Tensor]
) -> Tensor:
    """All exits in one [K, N, C] tensor: one softmax, one cross entropy, one contraction."""
    t, exits, rows = recipe.temperature, len(logits), target.shape[0]
    z = torch.stack([x.float() for x in (*logits, *teachers)])
    log_q = F.log_softmax(z / t, dim=2)
    fixed = log_q.detach()
    q = fixed.exp()
    weights = torch.tensor(recipe.weights, device=z.device)
    if recipe.pair == "mutual" and exits > 1:
        mixture = (q.sum(0) - q) * recipe.weights[0][1]
    else:
        mixture = torch.einsum("ij,jnc->inc", weights, q)
    entropy = (weights.sum(0)[:, None, None] * q * fixed).sum()
    divergence = entropy - (mixture * log_q[:exits]).sum()
    cross_entropy = F.cross_entropy(z[:exits].flatten(0, 1), target.repeat(exits), reduction="sum")
    return (cross_entropy + t * t * divergence) / rows


def softmax_per_exit(
    recipe: Recipe, logits: Sequence[Tensor], target: Tensor, teachers: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """One `F.softmax` per exit."""
    return tuple(F.softmax(z / recipe.temperature, dim=1) for z in logits)


def softmax_stacked(
    recipe: Recipe, logits: Sequence[Tensor], target: Tensor, teachers: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """One `F.softmax` over a [K, N, C] tensor."""
    return F.softmax(torch.stack(list(logits)) / recipe.temperature, dim=2).unbind(0)


def statistics_naive(
    recipe: Recipe, logits: Sequence[Tensor], target: Tensor, teachers: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Each statistic by the function that has its name, per exit."""
    rows = []
    for z in logits:
        p = F.softmax(z.float(), dim=1)
        confidence, prediction = p.max(dim=1)
        top = p.topk(2, dim=1).values
        entropy = -(p * F.log_softmax(z.float(), dim=1)).sum(1)
        lse = torch.logsumexp(z.float(), dim=1)
        rows.append((lse, confidence, prediction, top[:, 0] - top[:, 1], entropy, (p * p).sum(1)))
    return tuple(torch.stack(column) for column in zip(*rows, strict=True))


def _statistics(z: Tensor) -> tuple[Tensor, ...]:
    """From one log-sum-exp; the runner-up by masking the winner, which fuses where topk cannot."""
    z = z.float()
    lse = torch.logsumexp(z, dim=-1)
    shifted = z - lse[..., None]
    p = shifted.exp()
    prediction = z.argmax(dim=-1)
    confidence = p.amax(dim=-1)
    winner = torch.arange(z.shape[-1], device=z.device) == prediction[..., None]
    runner_up = torch.where(winner, 0.0, p).amax(dim=-1)
    entropy = -(p * shifted).sum(-1)
    return lse, confidence, prediction, confidence - runner_up, entropy, (p * p).sum(-1)


def statistics_per_exit(
    recipe: Recipe, logits: Sequence[Tensor], target: Tensor, teachers: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """One softmax per exit, everything else from it."""
    columns = zip(*(_statistics(z) for z in logits), strict=True)
    return tuple(torch.stack(column) for column in columns)


def statistics_stacked(
    recipe: Recipe, logits: Sequence[Tensor], target: Tensor, teachers: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """The same over a [K, N, C] tensor."""
    return _statistics(torch.stack(list(logits)))


class Baselines(NamedTuple):
    """What a family is measured against: as people write it, work shared, and compiled."""

    naive: Formulation
    shared: Formulation
    compiled: dict[str, Formulation]


BASELINES = {
    "loss": Baselines(
        pairwise,
        shared,
        {
            "pairwise": pairwise,
            "shared": shared,
            "mean teacher": mean_teacher,
            "gram": gram,
            "stacked": stacked,
            "closed form": closed_form,
        },
    ),
    "softmax": Baselines(
        softmax_per_exit,
        softmax_stacked,
        {"per exit": softmax_per_exit, "stacked": softmax_stacked},
    ),
    "statistics": Baselines(
        statistics_naive,
        statistics_per_exit,
        {"per exit": statistics_per_exit, "stacked": statistics_stacked},
    ),
}

# SPDX-License-Identifier: Apache-2.0
"""Thresholds whose loss of accuracy is bounded at a level of confidence: Learn then Test.

Angelopoulos, Bates, Candes, Jordan, Lei: "Learn then Test: Calibrating Predictive Algorithms to
Achieve Risk Control" (2110.01052), with fixed-sequence testing. The p-values are the exact binomial
tail (Clopper-Pearson), which the 0/1 loss allows, or the Hoeffding-Bentkus bound of the paper.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from msdkern.calibrate.thresholds import (
    DISABLED,
    check_correct,
    check_scores,
)
from msdkern.ops import checks

BOUNDS = ("binomial", "hoeffding_bentkus")


class RiskControl(NamedTuple):
    """Thresholds [K], their loss on the calibration rows, and what holds for rows to come.

    ``upper_bound``: the Clopper-Pearson bound of the loss of these thresholds at level 1 - delta,
    taken by themselves. ``tested`` candidates were accepted in a row; 0 leaves every early exit
    disabled, which loses nothing.
    """

    thresholds: Tensor
    loss: float
    upper_bound: float
    tested: int


def risk_controlled_thresholds(
    score: Tensor,
    correct: Tensor,
    max_loss: float,
    delta: float = 0.05,
    *,
    candidates: Tensor | Sequence[float] | None = None,
    bound: str = "binomial",
    lowest: bool = False,
) -> RiskControl:
    """The most eager thresholds that, with probability 1 - delta, lose at most ``max_loss``.

    The loss of a row is 1 where the last exit is right and the exit that answers is wrong, else 0;
    its mean is an upper bound of the accuracy that leaving early costs. Candidates are tested in
    the order given, H: loss > max_loss, each at level delta, until one is not rejected; the one
    before it is returned. Then P(loss of the result > max_loss) <= delta over calibration sets.

    Assumption: the calibration rows and the rows to come are drawn independently from one
    distribution, and neither the network, nor its temperatures, nor the candidates were chosen by
    looking at the calibration rows.

    Args:
        score, correct: [K, n], as in `msdkern.calibrate.outcome`.
        max_loss: between 0 and 1, exclusive, e.g. 0.01 for one point of accuracy.
        delta: the probability of being wrong, between 0 and 1, exclusive.
        candidates: thresholds from careful to eager: [M] for one threshold at all exits, or
            [M, K]. Default: 1, 0.999, .., 0 (``lowest``: 0, 0.001, .., 1), for confidence, margin
            and normalised entropy.
        bound: "binomial" or "hoeffding_bentkus".
        lowest: the score fires at or below its threshold.

    Raises: ValueError with one sentence.
    """
    op = "risk_controlled_thresholds"
    score = check_scores(op, "score", score)
    check_correct(op, score, correct)
    checks.choice(op, "bound", bound, BOUNDS)
    for name, value in (("max_loss", max_loss), ("delta", delta)):
        if not isinstance(value, (int, float)) or not 0.0 < value < 1.0:
            checks.fail(op, f"{name} must be between 0 and 1, exclusive", value)
    limits = _candidates(op, candidates, score, lowest)
    losses = _losses(score, correct, limits, lowest)
    rows = score.shape[1]
    accepted = P_VALUES[bound](losses, rows, max_loss) <= delta
    tested = int(accepted.long().cumprod(0).sum())
    if not tested:
        off = torch.full_like(score[:, 0], -DISABLED if lowest else DISABLED)
        off[-1] = -off[-1]
        return RiskControl(off, 0.0, 0.0, 0)
    count = int(losses[tested - 1])
    chosen = limits[tested - 1].clone()
    return RiskControl(chosen, count / rows, upper_bound(count, rows, delta), tested)


def _candidates(
    op: str, candidates: Tensor | Sequence[float] | None, score: Tensor, lowest: bool
) -> Tensor:
    if candidates is None:
        candidates = torch.linspace(0, 1, 1001) if lowest else torch.linspace(1, 0, 1001)
    limits = torch.as_tensor(candidates, device=score.device).to(score.dtype)
    exits = score.shape[0]
    if limits.dim() == 1:
        limits = limits[:, None].repeat(1, exits)
        limits[:, -1] = DISABLED if lowest else -DISABLED
    if limits.dim() != 2 or limits.shape[1] != exits or bool(limits.isnan().any()):
        checks.fail(op, f"candidates must be [M] or [M, {exits}], without NaN", limits)
    return limits


def _losses(score: Tensor, correct: Tensor, limits: Tensor, lowest: bool) -> Tensor:
    """For every candidate, how many rows the last exit answers right and the first to fire not."""
    lost = []
    for part in limits.split(64):
        waiting = torch.ones(len(part), score.shape[1], dtype=torch.bool, device=score.device)
        wrong = torch.zeros_like(waiting)
        for k in range(score.shape[0] - 1):
            limit = part[:, k : k + 1]
            fired = score[k] <= limit if lowest else score[k] >= limit
            wrong |= waiting & fired & ~correct[k]
            waiting &= ~fired
        lost.append((wrong & correct[-1]).sum(1))
    return torch.cat(lost)


# P-values of H: loss > alpha, for counts of lost rows ------------------------------------------


def log_tail(rows: int, p: float) -> Tensor:
    """log P(Bin(rows, p) <= x) for x = 0 .. rows."""
    x = torch.arange(rows + 1, dtype=torch.float64)
    n = torch.tensor(float(rows), dtype=torch.float64)
    ways = torch.lgamma(n + 1) - torch.lgamma(x + 1) - torch.lgamma(n - x + 1)
    return torch.logcumsumexp(ways + x * math.log(p) + (n - x) * math.log1p(-p), 0)


def binomial(losses: Tensor, rows: int, alpha: float) -> Tensor:
    """P(Bin(n, alpha) <= losses)."""
    return log_tail(rows, alpha).exp().clamp_max(1.0)[losses.cpu()]


def hoeffding_bentkus(losses: Tensor, rows: int, alpha: float) -> Tensor:
    """min(exp(-n h(min(R, alpha), alpha)), e P(Bin(n, alpha) <= n R)), h of two Bernoullis."""
    a = (losses.cpu().double() / max(rows, 1)).clamp_max(alpha)
    h = torch.xlogy(a, a / alpha) + torch.xlogy(1 - a, (1 - a) / (1 - alpha))
    return torch.minimum((-rows * h).exp(), math.e * binomial(losses, rows, alpha)).clamp_max(1.0)


P_VALUES = {"binomial": binomial, "hoeffding_bentkus": hoeffding_bentkus}


def upper_bound(losses: int, rows: int, delta: float) -> float:
    """Clopper-Pearson: the largest p with P(Bin(n, p) <= losses) >= delta."""
    if losses >= rows:
        return 1.0
    low, high = losses / rows, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if float(log_tail(rows, middle)[losses]) >= math.log(delta):
            low = middle
        else:
            high = middle
    return high

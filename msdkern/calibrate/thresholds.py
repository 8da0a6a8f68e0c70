# SPDX-License-Identifier: Apache-2.0
"""Thresholds for budgeted batch classification, by the public procedure of MSDNet, vectorised.

Huang et al., "Multi-Scale Dense Networks for Resource Efficient Image Classification" (ICLR 2018).
Scores are [K, n]: what every exit says of every row of a calibration set.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from msdkern import reference
from msdkern.ops import checks, gate

DISABLED = 1e8  # the threshold of an exit that nobody takes; that of the last exit is its negative


class Outcome(NamedTuple):
    """What thresholds do to a set: accuracy and mean cost [...], share of the rows [..., K]."""

    accuracy: Tensor
    cost: Tensor
    share: Tensor


def geometric_fractions(exits: int, ratio: float) -> Tensor:
    """The share of rows for each exit: [K], proportional to ratio^1 .. ratio^K, sum 1.

    Ratios below 1 favour early exits. float32, computed as exp(k log ratio) / sum, the arithmetic
    of the public procedure, because its quotas are floors of these numbers.

    Raises: ValueError with one sentence.
    """
    op = "geometric_fractions"
    if not isinstance(exits, int) or exits < 1:
        checks.fail(op, "exits must be at least 1", exits)
    checks.positive(op, "ratio", ratio)
    powers = torch.exp(torch.log(torch.tensor([float(ratio)])) * torch.arange(1.0, exits + 1))
    return powers / powers.sum()


def budgeted_thresholds(
    confidence: Tensor, fractions: Tensor | Sequence[float], *, lowest: bool = False
) -> Tensor:
    """Thresholds by which exit k answers about the fraction rho_k of the rows.

    For k = 1 .. K-1 in turn: among the rows that no earlier exit claims, walk down from the most
    confident; T_k is the confidence of row number floor(n rho_k), and every row with at least that
    confidence is claimed. A quota of 0, and one that the remaining rows cannot fill, disable the
    exit (T_k = 1e8). T_K = -1e8. Ties are claimed together, so an exit may answer more than its
    quota. Quotas are floors in the dtype of the fractions, as in the public procedure.

    Args:
        confidence: [K, n], floating point, without NaN; any score that fires at or above.
        fractions: [K], or [B, K] for B budgets at once; not negative.
        lowest: the score fires at or below its threshold (entropy); signs change throughout.

    Returns: [K] or [B, K], in the dtype and on the device of the confidence.

    Raises: ValueError with one sentence.
    """
    op = "budgeted_thresholds"
    confidence = check_scores(op, "confidence", confidence)
    share = torch.as_tensor(fractions, device=confidence.device)
    exits, rows = confidence.shape
    if share.dim() not in (1, 2) or share.shape[-1] != exits or not share.is_floating_point():
        checks.fail(op, f"fractions must be floating point [{exits}] or [B, {exits}]", share)
    if not bool(((share >= 0) & share.isfinite()).all()):
        checks.fail(op, "fractions must not be negative or NaN", share.min().item())
    score = -confidence if lowest else confidence
    quota = (rows * share.reshape(-1, exits)).floor().to(torch.int32)
    found = torch.full(quota.shape, DISABLED, dtype=score.dtype, device=score.device)
    found[:, -1] = -DISABLED
    claimed = torch.zeros(len(quota), rows, dtype=torch.bool, device=score.device)
    for k in range(exits - 1 if rows else 0):
        value, order = score[k].sort(descending=True)
        walked = (~claimed[:, order]).cumsum(1, dtype=torch.int32)
        wanted = quota[:, k : k + 1].contiguous()
        place = torch.searchsorted(walked, wanted).clamp_max(rows - 1)
        filled = (wanted > 0) & (walked[:, -1:] >= wanted)
        found[:, k : k + 1] = torch.where(filled, value[place], DISABLED)
        claimed |= score[k] >= found[:, k : k + 1]
    found = -found if lowest else found
    return found[0] if share.dim() == 1 else found


def exit_scores(
    logits: Tensor | Sequence[Tensor],
    measure: str = "confidence",
    *,
    temperature: float | Tensor | Sequence[float] = 1.0,
    score: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Score and prediction [K, n] of every exit, to the last bit what the gates compare.

    Arguments as in `msdkern.exit_gate`. Raises: ValueError, TypeError with one sentence.
    """
    op = "exit_scores"
    z = checks.exits(op, logits)
    exits, _, _ = checks.rows_and_classes(op, z)
    t = checks.per_exit(op, "temperature", temperature, exits, z[0])
    each = list(z[0].unbind(0)) if z[0].dim() == 3 else z
    steps: list[gate.GateStep] = []
    for k, x in enumerate(each):
        previous = steps[-1] if steps and measure == "patience" else None
        steps.append(
            gate.gate_step(
                x,
                0.0,
                measure,
                temperature=t if t.dim() == 0 else t[k],
                score=None if score is None else score[k],
                previous=previous,
            )
        )
    return torch.stack([s.score for s in steps]), torch.stack([s.prediction for s in steps])


def outcome(
    score: Tensor,
    correct: Tensor,
    thresholds: Tensor | Sequence[float],
    cost: Tensor | Sequence[float],
    *,
    lowest: bool = False,
) -> Outcome:
    """Accuracy, mean cost and share of every exit when rows leave by these thresholds.

    A row leaves at the first exit with score >= threshold (``lowest``: <=), ties included; the last
    always answers.

    Args:
        score, correct: [K, n]; correct is bool: whether the exit's prediction is right.
        thresholds: [K], or [B, K] for B settings at once.
        cost: [K], what a row costs that leaves at exit k, all earlier exits included.

    Returns: Outcome, float64; [B] in front where thresholds has it.

    Raises: ValueError with one sentence.
    """
    op = "outcome"
    score = check_scores(op, "score", score, nan=True)
    check_correct(op, score, correct)
    limit = torch.as_tensor(thresholds, device=score.device).to(score.dtype)
    exits, rows = score.shape
    if limit.dim() not in (1, 2) or limit.shape[-1] != exits:
        checks.fail(op, f"thresholds must be [{exits}] or [B, {exits}]", limit)
    price = check_cost(op, cost, score)
    measure = reference.LOW_SCORES[0] if lowest else reference.MEASURES[0]
    flat = limit.reshape(-1, exits)
    waiting = torch.ones(len(flat), rows, dtype=torch.bool, device=score.device)
    right = torch.zeros(len(flat), dtype=torch.float64, device=score.device)
    counts = []
    for k in range(exits):
        fired = reference.fires(score[k], flat[:, k : k + 1], measure)
        leaving = waiting & fired if k < exits - 1 else waiting
        waiting = waiting & ~fired
        counts.append(leaving.sum(1))
        right += (leaving & correct[k]).sum(1)
    share = torch.stack(counts, 1).double() / max(rows, 1)
    found = Outcome(right / max(rows, 1), share @ price, share)
    return found if limit.dim() == 2 else Outcome(*(x[0] for x in found))


# Checks that the solvers share -----------------------------------------------------------------


def check_scores(op: str, name: str, score: Tensor, nan: bool = False) -> Tensor:
    checks.plain(op, name, score)
    if score.dim() != 2 or not score.is_floating_point() or score.shape[0] < 1:
        checks.fail(op, f"{name} must be floating point [K, n]", score)
    if not nan and bool(score.isnan().any()):
        checks.fail(op, f"{name} must not be NaN", f"{int(score.isnan().sum())} NaN")
    return score.detach()


def check_correct(op: str, score: Tensor, correct: Tensor) -> None:
    if not isinstance(correct, Tensor) or correct.dtype != torch.bool:
        checks.fail(op, "correct must be a bool tensor [K, n]", correct)
    if correct.shape != score.shape or correct.device != score.device:
        rule = f"correct must be shaped and placed like the score {list(score.shape)}"
        checks.fail(op, rule, correct)


def check_cost(op: str, cost: Tensor | Sequence[float], score: Tensor) -> Tensor:
    price = torch.as_tensor(cost, dtype=torch.float64, device=score.device)
    if price.shape != score.shape[:1]:
        checks.fail(op, f"cost must be {score.shape[0]} numbers, one per exit", price)
    if not bool((price.diff() >= 0).all() and (price >= 0).all()):
        numbers = ", ".join(f"{p:g}" for p in price.tolist())
        checks.fail(op, "cost must not be negative or fall with depth", numbers)
    return price

# SPDX-License-Identifier: Apache-2.0
"""The cheapest thresholds that are expected to keep the accuracy of the whole network.

Thresholds look better on the rows that chose them than on others, the more so the more freely they
were chosen. So the budget is found by cross-validation: every row is judged by thresholds that the
other folds chose.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from msdkern.calibrate.solve import maximize_accuracy
from msdkern.calibrate.thresholds import (
    DISABLED,
    check_correct,
    check_cost,
    check_scores,
    outcome,
)
from msdkern.ops import checks

FOLDS = 5
BUDGETS = 16  # evenly between the cost of the first exit and that of the last


class Match(NamedTuple):
    """Thresholds [K], and their expected loss of accuracy and budget of mean cost per row."""

    thresholds: Tensor
    loss: float
    budget: float


def match_accuracy(
    score: Tensor,
    correct: Tensor,
    cost: Tensor | Sequence[float],
    max_loss: float = 0.0,
    *,
    lowest: bool = False,
) -> Match:
    """The thresholds of the smallest budget whose expected accuracy is at most ``max_loss`` below.

    Below the accuracy of the last exit, that is. Expected on other rows, from 5 folds (row i is in
    fold i mod 5); `risk_controlled_thresholds` bounds the loss instead, at a probability. Where no
    budget keeps to it, no row leaves early. Deterministic.

    Args:
        score, correct, cost, lowest: as of `msdkern.calibrate.maximize_accuracy`.
        max_loss: a share of the rows; may be negative.

    Raises: ValueError with one sentence.
    """
    op = "match_accuracy"
    score = check_scores(op, "score", score)
    check_correct(op, score, correct)
    price = check_cost(op, cost, score)
    if score.shape[1] < FOLDS:
        checks.fail(op, f"there must be at least {FOLDS} rows", score)
    if not isinstance(max_loss, (int, float)) or not -1 <= max_loss <= 1:
        checks.fail(op, "max_loss must be between -1 and 1", max_loss)
    whole = float(correct[-1].double().mean())
    for budget in torch.linspace(float(price[0]), float(price[-1]), BUDGETS).tolist():
        limit = max(budget, float(price[0]))
        loss = whole - _expected_accuracy(score, correct, price, limit, lowest)
        if loss <= max_loss:
            found, _ = maximize_accuracy(score, correct, price, limit, lowest=lowest)
            return Match(found, loss, limit)
    never = score.new_full((len(price),), DISABLED)
    never[-1] = -DISABLED
    return Match(-never if lowest else never, 0.0, float(price[-1]))


def _expected_accuracy(
    score: Tensor, correct: Tensor, cost: Tensor, budget: float, lowest: bool
) -> float:
    """By thresholds that each fold got from the others."""
    fold = torch.arange(score.shape[1], device=score.device) % FOLDS
    right = 0.0
    for number in range(FOLDS):
        own = fold == number
        found, _ = maximize_accuracy(score[:, ~own], correct[:, ~own], cost, budget, lowest=lowest)
        here = outcome(score[:, own], correct[:, own], found, cost, lowest=lowest)
        right += float(here.accuracy) * int(own.sum())
    return right / score.shape[1]

# SPDX-License-Identifier: Apache-2.0
"""Thresholds that maximise accuracy under a budget of expected cost.

Which rows an exit takes decides what is left for the deeper ones, so the thresholds are searched
together. Given all others, the best threshold of one exit is found exactly: sort its rows by score
and take the best prefix sum of what leaving gains. Repeating that exit by exit climbs, for the
Lagrangian accuracy - lambda cost at many prices lambda at once, and then for the accuracy itself
inside the budget.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from msdkern import reference
from msdkern.calibrate.thresholds import (
    DISABLED,
    Outcome,
    budgeted_thresholds,
    check_correct,
    check_cost,
    check_scores,
    geometric_fractions,
    outcome,
)
from msdkern.ops import checks

PRICES = 48  # how many lambdas are tried at once
SWEEPS = 12  # over all exits; climbing usually ends after three
STARTS = 12  # that continue inside the budget
RATIOS = [p / 20 for p in range(1, 40)]  # of the public procedure


def maximize_accuracy(
    score: Tensor,
    correct: Tensor,
    cost: Tensor | Sequence[float],
    budget: float,
    *,
    lowest: bool = False,
) -> tuple[Tensor, Outcome]:
    """The thresholds of the highest accuracy found whose mean cost is within the budget.

    Never worse than the 39 settings of the public procedure that keep the budget. Deterministic.
    The accuracy is that of the rows given: choose on one set, report on another.

    Args:
        score, correct: [K, n], as in `msdkern.calibrate.outcome`.
        cost: [K], what a row costs that leaves at exit k; it does not fall with depth.
        budget: the largest mean cost of a row.
        lowest: the score fires at or below its threshold (entropy).

    Returns: thresholds [K] in the dtype of the score, and their `Outcome` on these rows.

    Raises: ValueError with one sentence, also where no thresholds can meet the budget.
    """
    op = "maximize_accuracy"
    score = check_scores(op, "score", score)
    check_correct(op, score, correct)
    price = check_cost(op, cost, score)
    if score.shape[1] == 0:
        checks.fail(op, "there must be at least one row", score)
    if not budget >= float(price[0]):
        rule = f"budget cannot be met: every row costs at least {float(price[0]):g}"
        checks.fail(op, rule, budget)
    search = _Search(-score if lowest else score, correct, price)
    starts = _geometric(search.score)
    lambdas = _prices(price).to(score.device)
    start = torch.full((len(lambdas), len(price)), DISABLED, dtype=score.dtype, device=score.device)
    priced = search.climb(start, budget=None, price=lambdas)
    first = torch.full_like(start[:1], -DISABLED)  # everybody leaves at once: always affordable
    found = torch.cat([starts, priced, first])
    good = outcome(search.score, correct, found, price)
    keep = good.accuracy.masked_fill(good.cost > budget, -1.0).topk(min(STARTS, len(found))).indices
    keep = keep[good.cost[keep] <= budget]
    found = search.climb(found[keep], budget=budget, price=None)
    best = _best(outcome(search.score, correct, found, price), budget)
    thresholds = found[best]
    thresholds[-1] = -DISABLED
    thresholds = -thresholds if lowest else thresholds
    return thresholds, outcome(score, correct, thresholds, price, lowest=lowest)


def _geometric(score: Tensor) -> Tensor:
    fractions = torch.stack([geometric_fractions(len(score), r) for r in RATIOS])
    return budgeted_thresholds(score, fractions.to(score.device))


def _prices(cost: Tensor) -> Tensor:
    """Accuracy per unit of cost, from so dear that all leave at once to free."""
    span = float(cost[-1] - cost[0]) or 1.0
    return torch.cat([torch.zeros(1), torch.logspace(-4, 1, PRICES - 1)]).double() / span


def _best(found: Outcome, budget: float) -> int:
    """The most accurate that keeps the budget; the cheapest of equals."""
    accuracy = found.accuracy.masked_fill(found.cost > budget, -1.0)
    cost = found.cost.masked_fill(accuracy < accuracy.max(), torch.inf)
    return int(cost.argmin())


class _Search:
    """Scores sorted once; thresholds of B settings improved together."""

    def __init__(self, score: Tensor, correct: Tensor, cost: Tensor) -> None:
        self.score, self.cost = score, cost
        self.correct = correct.double()
        self.value, self.order = score.sort(dim=1, descending=True, stable=True)
        # A threshold cannot part rows of one score: it stands behind the last of them.
        differs = self.value[:, 1:] != self.value[:, :-1]
        self.ends = torch.cat(
            [
                differs,
                torch.ones_like(
                    differs[:, :1] if differs.shape[1] else self.value[:, :1], dtype=torch.bool
                ),
            ],
            1,
        )

    def climb(self, thresholds: Tensor, budget: float | None, price: Tensor | None) -> Tensor:
        """Improves every setting, exit by exit, until none changes: inside a budget, or at the
        price [B] of each."""
        thresholds = thresholds.clone()
        for _ in range(SWEEPS):
            before = thresholds.clone()
            for k in range(len(self.cost) - 2, -1, -1):
                self._improve(thresholds, k, budget, price)
            if torch.equal(before, thresholds):
                break
        return thresholds

    def _improve(
        self, thresholds: Tensor, k: int, budget: float | None, price: Tensor | None
    ) -> None:
        """The best threshold of exit k, all others as they are."""
        waiting = self._waiting(thresholds, k)
        later = self._later(thresholds, k)
        order, rows = self.order[k], self.score.shape[1]
        gain = torch.where(waiting, self.correct[k] - self.correct.gather(0, later), 0.0)
        paid = torch.where(waiting, self.cost[k] - self.cost[later], 0.0)
        zero = gain.new_zeros(len(gain), 1)
        gain = torch.cat([zero, gain[:, order].cumsum(1)], 1) / rows
        paid = torch.cat([zero, paid[:, order].cumsum(1)], 1) / rows
        allowed = torch.cat([torch.ones_like(self.ends[k, :1]), self.ends[k]]).expand_as(gain)
        if budget is None:
            value = gain - price[:, None] * paid  # type: ignore[index]
        else:
            # Inside the budget; of equal accuracies the cheaper.
            others = self._cost_without(thresholds, k, waiting, later)
            allowed = allowed & (others[:, None] + paid <= budget * (1 + 1e-12))
            value = gain - 1e-9 * paid / float(self.cost[-1] or 1.0)
        place = value.masked_fill(~allowed, -torch.inf).argmax(1)
        limits = torch.cat([self.value.new_full((1,), DISABLED), self.value[k]])
        feasible = allowed.any(1)
        thresholds[:, k] = torch.where(feasible, limits[place], thresholds[:, k])

    def _fired(self, thresholds: Tensor, k: int) -> Tensor:
        return reference.fires(self.score[k], thresholds[:, k : k + 1], reference.MEASURES[0])

    def _waiting(self, thresholds: Tensor, k: int) -> Tensor:
        """Rows that reach exit k: [B, n]."""
        shape = (len(thresholds), self.score.shape[1])
        waiting = torch.ones(shape, dtype=torch.bool, device=self.score.device)
        for j in range(k):
            waiting &= ~self._fired(thresholds, j)
        return waiting

    def _later(self, thresholds: Tensor, k: int) -> Tensor:
        """Where each row leaves that passes exit k: [B, n]."""
        last = len(self.cost) - 1
        shape = (len(thresholds), self.score.shape[1])
        index = torch.full(shape, last, device=self.score.device)
        for j in range(last - 1, k, -1):
            index = torch.where(self._fired(thresholds, j), j, index)
        return index

    def _cost_without(self, thresholds: Tensor, k: int, waiting: Tensor, later: Tensor) -> Tensor:
        """Mean cost [B] when nobody leaves at exit k."""
        passed, left = torch.zeros_like(waiting), torch.zeros(len(waiting), dtype=torch.float64)
        left = left.to(waiting.device)
        for j in range(k):
            fired = self._fired(thresholds, j) & ~passed
            left += fired.sum(1) * self.cost[j]
            passed |= fired
        left += torch.where(waiting, self.cost[later], 0.0).sum(1)
        return left / self.score.shape[1]

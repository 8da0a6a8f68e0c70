# SPDX-License-Identifier: Apache-2.0
"""The cheapest thresholds that keep the last exit's accuracy, on rows that did not choose them."""

import pytest
import torch

from msdkern import calibrate
from tests.cases import generator

COST = [1.0, 2.0, 4.0]


def network(rows, seed):
    """Three exits that are right about rows that are easy enough for them, and nearly know it."""
    g = generator(seed)
    easy = torch.rand(rows, generator=g)
    ease = easy - torch.tensor([[0.35], [0.25], [0.2]])
    noise = 0.2 * torch.randn(2, 3, rows, generator=g)
    return torch.sigmoid(8 * (ease + noise[0])), ease + noise[1] > 0


def test_the_loss_is_what_other_rows_show():
    """The loss found by folds is near it; that of the rows that chose is far below."""
    fresh_score, fresh = network(200_000, 99)
    whole = float(fresh[-1].double().mean())
    seen, folds, there, cost = [], [], [], []
    for seed in range(12):
        score, correct = network(400, seed)
        found = calibrate.match_accuracy(score, correct, COST, 0.01)
        own, other = (
            calibrate.outcome(s, c, found.thresholds, COST)
            for s, c in ((score, correct), (fresh_score, fresh))
        )
        assert found.loss <= 0.01
        assert float(own.cost) <= found.budget + 1e-9
        seen.append(float(correct[-1].double().mean() - own.accuracy))
        folds.append(found.loss)
        there.append(whole - float(other.accuracy))
        cost.append(float(other.cost))
    seen, folds, there, cost = (sum(values) / 12 for values in (seen, folds, there, cost))
    assert abs(folds - there) < 0.01
    assert seen < there - 0.01
    assert cost < 3.5  # of 4 for the whole network


def test_the_cheapest_is_taken():
    score, correct = network(200, 0)
    correct[0] = correct[1] = correct[2]
    found = calibrate.match_accuracy(score, correct, COST)
    assert (found.loss, found.budget) == (0.0, 1.0)
    assert float(calibrate.outcome(score, correct, found.thresholds, COST).cost) == 1.0


@pytest.mark.parametrize("lowest", [False, True])
def test_nobody_leaves_where_that_always_costs(lowest):
    score, correct = network(200, 1)
    correct[:2], correct[2] = False, True
    found = calibrate.match_accuracy(score, correct, COST, lowest=lowest)
    assert (found.loss, found.budget) == (0.0, 4.0)
    here = calibrate.outcome(score, correct, found.thresholds, COST, lowest=lowest)
    assert here.share.tolist() == [0.0, 0.0, 1.0]


def test_low_scores_are_high_ones_turned_round():
    score, correct = network(300, 2)
    high = calibrate.match_accuracy(score, correct, COST, 0.02)
    low = calibrate.match_accuracy(-score, correct, COST, 0.02, lowest=True)
    assert torch.equal(low.thresholds, -high.thresholds)
    assert low[1:] == high[1:]


def test_bad_input_is_one_sentence():
    score, correct = network(9, 0)
    wrong = {
        "match_accuracy: there must be at least 5 rows; got float32 [3, 4]": (
            score[:, :4], correct[:, :4], COST, 0.0),
        "match_accuracy: max_loss must be between -1 and 1; got nan": (
            score, correct, COST, float("nan")),
        "match_accuracy: cost must be 3 numbers, one per exit; got float64 [2]": (
            score, correct, [1.0, 2.0], 0.0),
    }  # fmt: skip
    for sentence, arguments in wrong.items():
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            calibrate.match_accuracy(*arguments)
        assert str(caught.value) == sentence

# SPDX-License-Identifier: Apache-2.0
"""The solver keeps its budget, beats the geometric family, and finds what brute force finds."""

import itertools

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from msdkern import calibrate
from tests.cases import generator, property_test


def problem(exits, rows, levels, seed):
    g = generator(seed)
    score = torch.randint(levels, (exits, rows), generator=g) / levels
    skill = 0.3 + 0.5 * score + 0.2 * torch.arange(exits)[:, None] / exits
    return score, torch.rand(exits, rows, generator=g) < skill


def brute_force(score, correct, cost, budget):
    """The best accuracy over all thresholds at the scores of every early exit, or off."""
    choices = [[*row.unique().tolist(), 1e8] for row in score[:-1]]
    limits = torch.tensor([[*c, -1e8] for c in itertools.product(*choices)])
    found = calibrate.outcome(score, correct, limits, cost)
    return found.accuracy[found.cost <= budget + 1e-12].max()


@hypothesis.given(
    st.integers(1, 12), st.sampled_from((2, 5, 100)), st.floats(1.0, 3.2), st.integers(0, 9999)
)
@hypothesis.settings(property_test, max_examples=60)
def test_two_exits_are_solved_exactly(rows, levels, budget, seed):
    score, correct = problem(2, rows, levels, seed)
    thresholds, found = calibrate.maximize_accuracy(score, correct, [1.0, 3.0], budget)
    assert float(found.cost) <= budget + 1e-9
    assert float(found.accuracy) == pytest.approx(
        float(brute_force(score, correct, [1.0, 3.0], budget))
    )
    assert thresholds[-1] == -1e8


def test_three_exits_come_close_to_brute_force():
    gaps = []
    for seed in range(60):
        score, correct = problem(3, 12, 12, seed)
        cost, budget = [1.0, 2.0, 4.0], 1.2 + 0.04 * seed
        _, found = calibrate.maximize_accuracy(score, correct, cost, budget)
        assert float(found.cost) <= budget + 1e-9
        gaps.append(float(brute_force(score, correct, cost, budget) - found.accuracy) * 12)
    assert min(gaps) > -1e-6
    assert sum(gap > 0.5 for gap in gaps) <= 6  # one row short, in few of the problems
    assert max(gaps) < 2.5


@pytest.mark.parametrize("lowest", [False, True])
def test_never_worse_than_the_geometric_family(lowest):
    score, correct = problem(5, 3000, 1000, 7)
    cost = [1.0, 1.5, 2.5, 3.0, 5.0]
    family = torch.stack([calibrate.geometric_fractions(5, p / 20) for p in range(1, 40)])
    given = 1 - score if lowest else score
    every = calibrate.outcome(
        given, correct, calibrate.budgeted_thresholds(given, family, lowest=lowest), cost,
        lowest=lowest,
    )  # fmt: skip
    for budget in (1.0, 1.3, 2.0, 3.0, 5.0):
        thresholds, found = calibrate.maximize_accuracy(given, correct, cost, budget, lowest=lowest)
        assert float(found.cost) <= budget + 1e-9
        again = calibrate.outcome(given, correct, thresholds, cost, lowest=lowest)
        assert torch.equal(again.share, found.share)
        good = every.accuracy[every.cost <= budget]
        assert not len(good) or found.accuracy >= good.max()
    repeated, _ = calibrate.maximize_accuracy(given, correct, cost, 5.0, lowest=lowest)
    assert torch.equal(repeated, thresholds)


def test_says_when_the_budget_cannot_be_met():
    score, correct = problem(2, 9, 5, 0)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        calibrate.maximize_accuracy(score, correct, [2.0, 3.0], 1.5)
    rule = "maximize_accuracy: budget cannot be met: every row costs at least 2"
    assert str(caught.value) == f"{rule}; got 1.5"
    with pytest.raises(ValueError, match="cannot be met"):
        calibrate.maximize_accuracy(score, correct, [2.0, 3.0], float("nan"))
    with pytest.raises(ValueError, match="there must be at least one row"):
        calibrate.maximize_accuracy(score[:, :0], correct[:, :0], [2.0, 3.0], 5.0)


def test_one_exit_and_all_rows_alike():
    correct = torch.ones(1, 4, dtype=torch.bool)
    thresholds, found = calibrate.maximize_accuracy(torch.rand(1, 4), correct, [2.0], 2.0)
    assert thresholds.tolist() == [-1e8]
    assert found.accuracy == 1
    score = torch.full((3, 5), 0.5)
    right = torch.tensor([[False], [True], [True]]).expand(3, 5)
    _, found = calibrate.maximize_accuracy(score, right, [1.0, 2.0, 9.0], 2.0)
    assert (float(found.accuracy), float(found.cost)) == (1.0, 2.0)

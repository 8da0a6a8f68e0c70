# SPDX-License-Identifier: Apache-2.0
"""The public procedure, row by row, against the vectorised one; and what thresholds lead to."""

import math
import time

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

import msdkern
from msdkern import calibrate
from tests.cases import generator, make_logits, property_test


def row_by_row(confidence, fractions):
    """The procedure as the field's scripts do it: one budget, one row after the other."""
    exits, rows = confidence.shape
    thresholds, claimed = [1e8] * exits, [False] * rows
    for k in range(exits - 1):
        quota, passed = math.floor(rows * fractions[k]), 0
        for row in confidence[k].sort(descending=True).indices.tolist():
            passed += not claimed[row]
            if not claimed[row] and passed == quota:
                thresholds[k] = confidence[k, row].item()
                break
        claimed = [
            c or v >= thresholds[k] for c, v in zip(claimed, confidence[k].tolist(), strict=True)
        ]
    thresholds[-1] = -1e8
    return thresholds


def tied(exits, rows, levels, seed, dtype=torch.float32):
    """Confidences of few distinct values."""
    return torch.randint(1, levels + 1, (exits, rows), generator=generator(seed)).to(dtype) / levels


@hypothesis.given(
    st.integers(1, 6), st.integers(0, 40), st.sampled_from((1, 2, 5, 1000)),
    st.lists(st.sampled_from((0.05, 0.3, 0.5, 0.95, 1.0, 1.6, 1.95)), min_size=1, max_size=4),
    st.sampled_from((torch.float32, torch.float64)), st.integers(0, 999),
)  # fmt: skip
@hypothesis.settings(property_test, max_examples=150)
def test_thresholds_are_those_of_the_public_procedure(exits, rows, levels, ratios, dtype, seed):
    confidence = tied(exits, rows, levels, seed, dtype)
    fractions = torch.stack([calibrate.geometric_fractions(exits, r) for r in ratios])
    found = calibrate.budgeted_thresholds(confidence, fractions)
    assert found.dtype == dtype
    assert found.tolist() == [row_by_row(confidence, f) for f in fractions]
    assert torch.equal(calibrate.budgeted_thresholds(confidence, fractions[0]), found[0])
    mirrored = calibrate.budgeted_thresholds(-confidence, fractions, lowest=True)
    assert torch.equal(mirrored, -found)


def test_quotas_of_zero_and_quotas_that_cannot_be_filled_disable_an_exit():
    confidence = torch.tensor([[0.9, 0.8, 0.7], [0.9, 0.8, 0.7], [0.9, 0.8, 0.7]])
    found = calibrate.budgeted_thresholds(confidence, [0.0, 1.0, 0.0])
    assert found.tolist() == [1e8, pytest.approx(0.7), -1e8]
    found = calibrate.budgeted_thresholds(confidence, [2 / 3, 2 / 3, 0.0])
    assert found.tolist() == [pytest.approx(0.8), 1e8, -1e8]


def test_tied_rows_are_claimed_together():
    confidence = torch.tensor([[0.9, 0.5, 0.5, 0.5], [0.1, 0.2, 0.3, 0.4], [1.0] * 4])
    found = calibrate.budgeted_thresholds(confidence, [0.5, 0.25, 0.25])
    assert found.tolist() == [0.5, 1e8, -1e8]  # nobody is left for the second exit


def test_geometric_fractions():
    found = calibrate.geometric_fractions(3, 2.0)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.tensor([2.0, 4.0, 8.0]) / 14)
    assert calibrate.geometric_fractions(1, 0.5).tolist() == [1.0]
    assert calibrate.geometric_fractions(4, 1.0).tolist() == [0.25] * 4


@pytest.mark.parametrize("measure", ["confidence", "entropy", "patience", "max_logit"])
def test_outcome_is_what_the_gate_does(measure):
    z = make_logits("random", (4, 200, 10), torch.float32)
    target = torch.randint(10, (200,), generator=generator(1))
    t = [1.0, 0.8, 1.5, 2.0]
    score, prediction = calibrate.exit_scores(z, measure, temperature=t)
    low, cost = measure == "entropy", [1.0, 2.0, 4.0, 8.0]
    limits = score.quantile(0.6, dim=1)
    out = msdkern.exit_gate(z, limits, measure, temperature=t)
    right = prediction == target
    many = calibrate.outcome(score, right, torch.stack([limits, limits + 1]), cost, lowest=low)
    found = calibrate.outcome(score, right, limits, cost, lowest=low)
    share = torch.bincount(out.exit_index, minlength=4) / 200
    torch.testing.assert_close(found.share.float(), share)
    assert float(found.accuracy) == pytest.approx((out.prediction == target).float().mean().item())
    assert float(found.cost) == pytest.approx(float(share @ torch.tensor(cost)), rel=1e-6)
    assert torch.equal(many.share[0], found.share)


def test_exit_scores_are_those_of_the_gate():
    z = make_logits("random", (3, 50, 100), torch.bfloat16)
    score, prediction = calibrate.exit_scores(z, "margin", temperature=2.0)
    for k in range(3):
        step = msdkern.gate_step(z[k], 0.0, "margin", temperature=2.0)
        assert torch.equal(step.score, score[k])
        assert torch.equal(step.prediction, prediction[k])


SCORE, RIGHT = torch.rand(2, 3), torch.ones(2, 3, dtype=torch.bool)
WRONG = {
    "geometric_fractions: exits must be at least 1; got 0": lambda: calibrate.geometric_fractions(
        0, 1.0
    ),
    "geometric_fractions: ratio must be positive and finite; got 0.0": lambda: (
        calibrate.geometric_fractions(3, 0.0)
    ),
    "budgeted_thresholds: confidence must be floating point [K, n]; got float32 [3]": lambda: (
        calibrate.budgeted_thresholds(SCORE[0], [1.0])
    ),
    "budgeted_thresholds: confidence must not be NaN; got '6 NaN'": lambda: (
        calibrate.budgeted_thresholds(SCORE * math.nan, [0.5, 0.5])
    ),
    "budgeted_thresholds: fractions must be floating point [2] or [B, 2]; got int64 [2]": lambda: (
        calibrate.budgeted_thresholds(SCORE, [0, 1])
    ),
    "budgeted_thresholds: fractions must not be negative or NaN; got -0.5": lambda: (
        calibrate.budgeted_thresholds(SCORE, [-0.5, 1.5])
    ),
    "outcome: correct must be a bool tensor [K, n]; got float32 [2, 3]": lambda: calibrate.outcome(
        SCORE, SCORE, [0.5, 0.5], [1.0, 2.0]
    ),
    "outcome: cost must not be negative or fall with depth; got '2, 1'": lambda: calibrate.outcome(
        SCORE, RIGHT, [0.5, 0.5], [2.0, 1.0]
    ),
    "outcome: thresholds must be [2] or [B, 2]; got float32 [1]": lambda: calibrate.outcome(
        SCORE, RIGHT, [0.5], [1.0, 2.0]
    ),
}


@pytest.mark.parametrize("sentence", WRONG)
def test_bad_input_is_one_sentence(sentence):
    with pytest.raises((ValueError, TypeError)) as caught:
        WRONG[sentence]()
    assert str(caught.value) == sentence


def test_forty_budgets_take_less_than_half_a_second():
    """Of processor time, over five exits and 10,000 rows of 100 classes, scores included."""
    z = make_logits("random", (5, 10000, 100), torch.float32)
    ratios = [p / 20 for p in range(1, 41)]
    began = time.process_time()
    score, prediction = calibrate.exit_scores(z)
    fractions = torch.stack([calibrate.geometric_fractions(5, r) for r in ratios])
    thresholds = calibrate.budgeted_thresholds(score, fractions)
    found = calibrate.outcome(score, prediction == 0, thresholds, [1.0, 2.0, 3.0, 4.0, 5.0])
    assert time.process_time() - began < 0.5
    assert thresholds.shape == (40, 5)
    assert bool((found.share.sum(1) - 1).abs().max() < 1e-9)

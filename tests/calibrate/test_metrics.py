# SPDX-License-Identifier: Apache-2.0
"""Calibration errors, NLL, Brier and temperatures; torchmetrics where it means the same."""

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st

import msdkern
from msdkern import calibrate
from tests.cases import DTYPES, generator, make_logits, property_test


def sample(exits, rows, classes, seed, sharp=2.0):
    z = torch.stack(make_logits("random", (exits, rows, classes), torch.float32, seed)) * sharp
    y = torch.randint(classes, (rows,), generator=generator(seed))
    z[:, torch.arange(rows), y] += 2.0
    s = msdkern.exit_statistics(z)
    return z, y, s.confidence, s.prediction == y


@pytest.mark.parametrize("norm", ["l1", "l2", "max"])
@pytest.mark.parametrize("bins", [1, 10, 15])
def test_equal_width_is_what_torchmetrics_says(bins, norm):
    functional = pytest.importorskip("torchmetrics.functional.classification")
    _, _, confidence, correct = sample(3, 500, 10, 0)
    assert float(confidence.max()) < 1
    found = calibrate.expected_calibration_error(confidence, correct, bins, norm=norm)
    for k in range(3):
        # A binary problem "is the prediction right", which has these confidences.
        theirs = functional.binary_calibration_error(
            confidence[k].double(), correct[k].long(), n_bins=bins, norm=norm
        )
        assert float(found[k]) == pytest.approx(float(theirs), rel=1e-5, abs=1e-7)


def test_a_confidence_of_exactly_one_belongs_to_the_last_bin():
    """torchmetrics keeps a bin of its own for it, so errors of opposite sign do not cancel."""
    functional = pytest.importorskip("torchmetrics.functional.classification")
    confidence = torch.tensor([0.95, 1.0])
    correct = torch.tensor([True, False])
    ours = calibrate.expected_calibration_error(confidence, correct, 10)
    theirs = functional.binary_calibration_error(confidence, correct.long(), n_bins=10)
    assert float(ours) == pytest.approx(0.975 - 0.5)
    assert float(theirs) == pytest.approx((0.05 + 1.0) / 2)
    assert calibrate.reliability(confidence, correct, 10).count.tolist() == [0] * 9 + [2]


@hypothesis.given(
    st.integers(0, 60), st.integers(1, 20), st.sampled_from(("width", "mass")), st.integers(0, 99)
)
@hypothesis.settings(property_test, max_examples=60)
def test_reliability_bin_by_bin(rows, bins, scheme, seed):
    g = generator(seed)
    confidence = (torch.rand(2, rows, generator=g) * 20).round() / 20
    correct = torch.rand(2, rows, generator=g) < confidence
    found = calibrate.reliability(confidence, correct, bins, scheme)
    for k in range(2):
        members = [[] for _ in range(bins)]
        order = confidence[k].argsort(stable=True).tolist()
        edges = torch.linspace(0, 1, bins + 1)
        for rank, i in enumerate(order):
            by_width = min(int((confidence[k, i] >= edges).sum()) - 1, bins - 1)
            members[by_width if scheme == "width" else rank * bins // rows].append(i)
        sizes = [len(m) for m in members]
        assert found.count[k].tolist() == sizes
        if scheme == "mass":
            assert max(sizes) - min(sizes) <= 1
        for b, m in enumerate(members):
            mean = [float(x[k][m].double().mean()) if m else 0.0 for x in (confidence, correct)]
            assert [float(found.confidence[k, b]), float(found.accuracy[k, b])] == pytest.approx(
                mean
            )
    ece = calibrate.expected_calibration_error(confidence[0], correct[0], bins, scheme)
    weight = found.count[0] / max(rows, 1)
    assert float(ece) == pytest.approx(
        float((weight * (found.accuracy[0] - found.confidence[0]).abs()).sum())
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_of_whole_distributions(dtype):
    z, y, _, _ = sample(3, 200, 10, 3)
    z = z.to(dtype)
    nll = calibrate.negative_log_likelihood(z, y)
    brier = calibrate.brier_score(list(z), y, msdkern.exit_statistics(z))
    for k in range(3):
        x = z[k].double()
        assert float(nll[k]) == pytest.approx(float(F.cross_entropy(x, y)), rel=1e-5)
        p = x.softmax(-1)
        true = (p - F.one_hot(y, 10)).square().sum(-1).mean()
        assert float(brier[k]) == pytest.approx(float(true), rel=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_temperature_is_where_the_likelihood_is_largest(dtype):
    z, y, _, _ = sample(4, 600, 10, 5)
    z = (z * torch.tensor([0.2, 0.5, 1.0, 2.0]).view(4, 1, 1)).to(dtype)
    found = calibrate.fit_temperature(z, y)
    assert found.dtype == torch.float64
    for k in range(4):
        x = z[k].double()
        nll = lambda t, x=x: float(F.cross_entropy(x / t, y))  # noqa: E731
        best = float(found[k])
        t = torch.tensor(best, dtype=torch.float64, requires_grad=True)
        slope = torch.autograd.grad(F.cross_entropy(x / t, y), t)[0] * t.detach()
        assert abs(float(slope)) < 3e-5
        assert nll(best) <= min(nll(best * 1.01), nll(best * 0.99))
    again = calibrate.fit_temperature(list(z / found.view(4, 1, 1).to(dtype)), y)
    torch.testing.assert_close(again, torch.ones_like(again), rtol=2e-2, atol=0)


def test_temperatures_without_a_minimum_end_at_the_bounds():
    y = torch.tensor([0, 1, 2])
    right = 5.0 * torch.eye(3)
    wrong = -right
    assert calibrate.fit_temperature([right, wrong], y).tolist() == pytest.approx([0.05, 50.0])


def test_calibrated_confidence_has_a_smaller_error():
    z, y, confidence, correct = sample(1, 3000, 10, 9, sharp=3.0)
    t = calibrate.fit_temperature(z, y)
    score, prediction = calibrate.exit_scores(z, temperature=t)
    before = calibrate.expected_calibration_error(confidence, correct, scheme="mass")
    after = calibrate.expected_calibration_error(score, prediction == y, scheme="mass")
    assert float(after) < 0.5 * float(before)


Z, Y = torch.zeros(2, 3, 4), torch.zeros(3, dtype=torch.int64)
WRONG = {
    "reliability: bins must be at least 1; got 0": lambda: calibrate.reliability(
        torch.rand(3), torch.ones(3, dtype=torch.bool), 0
    ),
    "reliability: scheme must be one of width, mass; got 'count'": lambda: calibrate.reliability(
        torch.rand(3), torch.ones(3, dtype=torch.bool), 3, "count"
    ),
    "reliability: confidence must be between 0 and 1; got '2.0'": lambda: calibrate.reliability(
        torch.full((3,), 2.0), torch.ones(3, dtype=torch.bool)
    ),
    "reliability: correct must be a bool tensor; got float32 [3]": lambda: calibrate.reliability(
        torch.rand(3), torch.ones(3)
    ),
    "brier_score: target must be int64 [3]; got int64 [2]": lambda: calibrate.brier_score(Z, Y[:2]),
    "negative_log_likelihood: labels must be in [0, 4); got 4": lambda: (
        calibrate.negative_log_likelihood(Z, Y + 4)
    ),
    "fit_temperature: there must be at least one row; got float32 [2, 0, 4]": lambda: (
        calibrate.fit_temperature(Z[:, :0], Y[:0])
    ),
    "expected_calibration_error: norm must be one of l1, l2, max; got 'l3'": lambda: (
        calibrate.expected_calibration_error(torch.rand(3), torch.ones(3) > 0, norm="l3")
    ),
}


@pytest.mark.parametrize("sentence", WRONG)
def test_bad_input_is_one_sentence(sentence):
    with pytest.raises((ValueError, TypeError)) as caught:
        WRONG[sentence]()
    assert str(caught.value) == sentence

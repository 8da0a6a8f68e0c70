# SPDX-License-Identifier: Apache-2.0
"""P-values against exact sums, and the promise itself, counted over many calibration sets."""

import math

import pytest
import torch

from msdkern import calibrate
from msdkern.calibrate import risk
from tests.cases import generator


def tail(x, n, p):
    """P(Bin(n, p) <= x), term by term."""
    return math.fsum(math.comb(n, j) * p**j * (1 - p) ** (n - j) for j in range(x + 1))


@pytest.mark.parametrize(("n", "p"), [(1, 0.5), (20, 0.1), (400, 0.02)])
def test_binomial_tail(n, p):
    found = risk.binomial(torch.arange(n + 1), n, p)
    expected = torch.tensor([tail(x, n, p) for x in range(n + 1)], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-300)


def test_hoeffding_bentkus_by_its_formula():
    n, alpha = 200, 0.1
    found = risk.hoeffding_bentkus(torch.arange(n + 1), n, alpha)
    for x in (0, 1, 10, 19, 20, 21, 200):
        r = min(x / n, alpha)
        h = (r * math.log(r / alpha) if r else 0) + (1 - r) * math.log((1 - r) / (1 - alpha))
        assert float(found[x]) == pytest.approx(
            min(math.exp(-n * h), math.e * tail(x, n, alpha), 1.0), rel=1e-6
        )
    assert bool((found >= risk.binomial(torch.arange(n + 1), n, alpha) - 1e-12).all())


def test_clopper_pearson():
    """Known limits: the rule of three, and the defining equation."""
    assert risk.upper_bound(0, 100, 0.05) == pytest.approx(1 - 0.05**0.01)
    p = risk.upper_bound(7, 300, 0.1)
    assert tail(7, 300, p) == pytest.approx(0.1)
    assert risk.upper_bound(5, 5, 0.05) == 1.0


def draw(rows, seed):
    """Scores that tell how likely the early exit is right; the last is right in 9 of 10 rows."""
    g = generator(seed)
    score = torch.rand(2, rows, generator=g, dtype=torch.float64)
    right = torch.rand(2, rows, generator=g) < torch.stack([score[0], torch.full((rows,), 0.9)])
    return score, right


def true_loss(threshold):
    """E[last right and early wrong; score >= t] = 0.9 (1 - t)^2 / 2."""
    return 0.9 * (1 - threshold) ** 2 / 2


@pytest.mark.parametrize("bound", risk.BOUNDS)
def test_the_promise_holds_over_calibration_sets(bound):
    broken, eager = 0, []
    for seed in range(300):
        score, right = draw(400, seed)
        found = calibrate.risk_controlled_thresholds(score, right, 0.05, 0.2, bound=bound)
        threshold = float(found.thresholds[0])
        broken += found.tested > 0 and true_loss(threshold) > 0.05
        eager.append(threshold)
    # At most 20 % and a spread of three deviations; and not by never leaving early.
    assert broken <= 300 * 0.2 + 3 * math.sqrt(300 * 0.2 * 0.8)
    best = 1 - math.sqrt(2 * 0.05 / 0.9)
    assert sum(eager) / 300 < best + 0.12
    if bound == "binomial":
        assert broken > 5  # the test is sharp enough to be broken sometimes


def test_nothing_is_promised_from_too_few_rows():
    score, right = draw(10, 0)
    found = calibrate.risk_controlled_thresholds(score, right, 0.01, 0.05)
    assert found.tested == 0
    assert found.thresholds.tolist() == [1e8, -1e8]
    assert (found.loss, found.upper_bound) == (0.0, 0.0)
    low = calibrate.risk_controlled_thresholds(score, right, 0.01, 0.05, lowest=True)
    assert low.thresholds.tolist() == [-1e8, 1e8]


def test_candidates_per_exit_and_from_above():
    score, right = draw(2000, 1)
    own = torch.tensor([[0.99, -1e8], [0.9, -1e8], [0.0, -1e8]])
    found = calibrate.risk_controlled_thresholds(score, right, 0.05, candidates=own)
    assert found.tested == 2
    assert found.thresholds.tolist() == [pytest.approx(0.9), -1e8]
    assert found.loss <= found.upper_bound <= 0.05
    mirrored = calibrate.risk_controlled_thresholds(
        1 - score, right, 0.05, candidates=[0.01, 0.1, 1.0], lowest=True
    )
    assert mirrored.tested == 2
    assert mirrored.thresholds[-1] == 1e8


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"max_loss": 0.0}, "max_loss must be between 0 and 1, exclusive; got 0.0"),
        ({"max_loss": 0.1, "delta": 1.0}, "delta must be between 0 and 1, exclusive; got 1.0"),
        (
            {"max_loss": 0.1, "bound": "normal"},
            "bound must be one of binomial, hoeffding_bentkus; got 'normal'",
        ),
        (
            {"max_loss": 0.1, "candidates": torch.zeros(3, 4)},
            "candidates must be [M] or [M, 2], without NaN; got float64 [3, 4]",
        ),
    ],
)
def test_bad_input_is_one_sentence(options, sentence):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        calibrate.risk_controlled_thresholds(*draw(5, 0), **options)
    assert str(caught.value) == f"risk_controlled_thresholds: {sentence}"

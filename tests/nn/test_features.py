# SPDX-License-Identifier: Apache-2.0
"""The feature term: every reduction, mask and exclusion against plain PyTorch."""

import pytest
import torch

from msdkern.nn import feature_loss
from msdkern.nn.features import anneal

EXITS, ROWS = 3, 5
VALID = torch.tensor([True, False, True, True, True])


@pytest.fixture
def features():
    generator = torch.Generator().manual_seed(0)
    make = torch.randn(EXITS, ROWS, 2, 2, generator=generator, dtype=torch.float64)
    return [f.clone().requires_grad_() for f in make]


FORMULAS = {
    "mean": lambda a, b: ((a - b) ** 2).sum(1).mean(),
    "sum": lambda a, b: ((a - b) ** 2).sum(),
    "elementmean": torch.nn.functional.mse_loss,
    "norm": torch.dist,
}


@pytest.mark.parametrize("imitate", ["last", "mean"])
@pytest.mark.parametrize("relu_mask", [False, True])
@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("reduction", FORMULAS)
def test_value_and_gradient(features, reduction, detach, relu_mask, imitate):
    options = {"detach": detach, "relu_mask": relu_mask, "imitate": imitate}
    weight = [0.5, 2.0] if imitate == "last" else [0.5, 2.0, 1.0]
    loss = feature_loss(features, VALID, reduction=reduction, weight=weight, **options)

    rows = [f.flatten(1)[VALID] for f in features]
    target = rows[-1] if imitate == "last" else sum(rows) / EXITS
    target = target.detach() if detach else target
    expected = 0.0 * features[-1].sum()
    for w, row in zip(weight, rows, strict=False):
        mask = (row > 0) | (target > 0) if relu_mask else torch.ones_like(row)
        expected = expected + w * FORMULAS[reduction](row * mask, target * mask)
    torch.testing.assert_close(loss, expected)
    found, wanted = (torch.autograd.grad(x, features) for x in (loss, expected))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_an_ignored_row_may_hold_anything(features):
    with torch.no_grad():
        for f in features:
            f[1] = torch.inf
    feature_loss(features, VALID).backward()
    for f in features:
        assert f.grad.isfinite().all()
        assert not f.grad[1].any()


@pytest.mark.parametrize("reduction", FORMULAS)
def test_no_valid_row_and_one_exit_are_zero(features, reduction):
    for chosen, valid in ((features, torch.zeros(ROWS, dtype=torch.bool)), (features[:1], None)):
        loss = feature_loss(chosen, valid, reduction=reduction)
        assert loss == 0
        assert not any(g.any() for g in torch.autograd.grad(loss, chosen))


def test_equal_features_have_a_zero_gradient_in_the_norm():
    features = [torch.ones(2, 3, requires_grad=True) for _ in range(2)]
    feature_loss(features, reduction="norm").backward()
    assert not features[0].grad.any()


def test_half_precision_is_accumulated_in_float32():
    features = [torch.full((1, 4096), 300.0, dtype=torch.float16), torch.zeros(1, 4096).half()]
    loss = feature_loss(features)
    assert loss.dtype == torch.float32
    assert loss == 4096 * 300.0**2


def test_a_normalizer_replaces_the_row_count(features):
    whole = feature_loss(features, reduction="mean")
    for normalizer in (10, torch.tensor(10)):
        part = feature_loss(features, reduction="mean", normalizer=normalizer)
        torch.testing.assert_close(part, whole * ROWS / 10)


@pytest.mark.parametrize(
    ("progress", "beta"), [(0.0, 0.5), (1 / 3, 0.4), (0.5, 0.3), (2 / 3, 0.2), (1.0, 0.1)]
)
def test_anneal_is_half_a_cosine(progress, beta):
    assert anneal(progress, 0.5, 0.1) == pytest.approx(beta)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"reduction": "x"}, "reduction must be one of mean, sum, elementmean, norm; got 'x'"),
        ({"imitate": "x"}, "imitate must be one of last, mean; got 'x'"),
        ({"weight": [1.0]}, "weight must have 2 numbers, one per term; got 1"),
    ],
)
def test_errors(features, options, words):
    with pytest.raises(ValueError, match=words):
        feature_loss(features, **options)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"of one shape; got \[\[2, 3\], \[2, 4\]\]"):
        feature_loss([torch.zeros(2, 3), torch.zeros(2, 4)])

# SPDX-License-Identifier: Apache-2.0
"""`exit_statistics` on every executor against float64; ties and NaN as `torch.argmax`."""

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

import msdkern
from tests import oracle
from tests.cases import (
    CLASSES,
    DTYPES,
    KINDS,
    LAYOUTS,
    generator,
    lay_out,
    make_logits,
    property_test,
)
from tests.servers import SERVERS, serve


def statistics(z):
    """The definitions, in the dtype of z."""
    log_p = torch.log_softmax(z, -1)
    p = log_p.exp()
    top = p.sort(-1, descending=True).values
    return {
        "lse": z.logsumexp(-1),
        "confidence": top[:, 0],
        "margin": top[:, 0] - top[:, 1] if z.shape[1] > 1 else torch.ones_like(top[:, 0]),
        "entropy": -torch.where(p > 0, p * log_p, 0.0).sum(-1),
        "sum_squares": p.square().sum(-1),
    }


def check_statistics(z, given, servers):
    dtype = z[0].dtype
    real = torch.float64 if dtype == torch.float64 else torch.float32
    for server in servers:
        with serve(server):
            out = msdkern.exit_statistics(given)
        for k, x in enumerate(z):
            true, peer = statistics(x.double()), statistics(x.to(real))
            reach = torch.where(x.isfinite(), x.double().abs(), 0.0)
            reach = reach.amax(-1) + x.shape[1] ** 0.5
            for name, value in true.items():
                ours = getattr(out, name)[k]
                assert ours.dtype == real
                size = reach if name in ("lse", "entropy") else 1.0
                oracle.check(f"{server} {name}", ours, value, peer[name], size, dtype)
            assert out.prediction.dtype == torch.int64
            assert torch.equal(out.prediction[k], x.double().argmax(-1)), server


@hypothesis.given(
    st.sampled_from((1, 2, 5, 32)), st.integers(0, 5), st.sampled_from(CLASSES),
    st.sampled_from(KINDS), st.sampled_from(LAYOUTS), st.sampled_from(DTYPES),
    st.integers(0, 999),
)  # fmt: skip
@hypothesis.settings(property_test, max_examples=120)
def test_values(exits, rows, classes, kind, layout, dtype, seed):
    z = make_logits(kind, (exits, rows, classes), dtype, seed)
    if layout == "stacked":
        given = torch.stack(z)
        z = list(given.unbind(0))
    else:
        given = z = [lay_out(x, layout) for x in z]
    check_statistics(z, given, SERVERS)


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_classes(dtype):
    z = make_logits("random", (2, 3, 30011), dtype)
    check_statistics(z, z, SERVERS)


def tied_and_nan(rows, classes, dtype, seed):
    """Few distinct values, so that the maximum is tied; some rows with NaN and infinities."""
    g = generator(seed)
    z = torch.randint(-2, 3, (rows, classes), generator=g).to(dtype)
    pick = torch.rand(rows, classes, generator=g)
    z = torch.where((pick < 0.3) & (torch.arange(rows) % 3 == 0)[:, None], -torch.inf, z)
    return torch.where((pick > 0.8) & (torch.arange(rows) % 3 == 1)[:, None], torch.nan, z)


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_and_nan_as_torch_argmax(dtype, server):
    for classes in (*CLASSES, 1031):
        z = tied_and_nan(24, classes, dtype, classes)
        with serve(server):
            found = msdkern.exit_statistics([z]).prediction[0]
            loss = msdkern.multi_exit_loss([z])
        assert torch.equal(found, z.float().argmax(-1)), classes
        assert torch.equal(loss.prediction[0], z.float().argmax(-1)), classes


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("value", [-torch.inf, torch.inf, torch.nan], ids=str)
def test_rows_of_one_value_without_a_softmax(value, server):
    """Nothing is said of p there, but the prediction is a class and nothing is read beyond."""
    for classes in (1, 5, 8, 19):
        z = torch.full((3, classes), value)
        with serve(server):
            out = msdkern.exit_statistics([z])
        assert torch.equal(out.prediction[0], z.argmax(-1))
        assert out.confidence.isnan().all()


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_margin_of_tied_classes_is_zero(dtype, server):
    for classes in (2, 9, 40):
        z = torch.zeros(2, classes, dtype=dtype)
        z[1, classes // 2 :] = 1.0
        with serve(server):
            margin = msdkern.exit_statistics([z]).margin
        tied = torch.tensor([0.0, 0.0 if classes - classes // 2 > 1 else 0.46211716])
        torch.testing.assert_close(margin[0].float(), tied)


@pytest.mark.parametrize("server", SERVERS)
def test_logits_that_require_grad_are_only_read(server):
    z = torch.randn(2, 3, 4, requires_grad=True)
    with serve(server):
        out = msdkern.exit_statistics(z)
    assert not any(value.requires_grad for value in out)

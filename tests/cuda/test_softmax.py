# SPDX-License-Identifier: Apache-2.0
"""Softmax, statistics and scaling on the executor `cuda`, executed by the harness."""

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

import msdkern
from msdkern.executors import cuda
from tests.cases import CLASSES, DTYPES, KINDS, LAYOUTS, lay_out, make_logits, property_test
from tests.ops.test_softmax import check_softmax
from tests.ops.test_statistics import check_statistics

# What registers and one block keep, and what takes a cluster.
SHAPES = [(3, 3, 1000), (2, 3, 3001), (2, 2, 4099), (1, 2, 40000), (2, 1, 100000)]


@hypothesis.given(
    st.sampled_from((1, 2, 5, 32)), st.integers(1, 5), st.sampled_from(CLASSES),
    st.sampled_from(KINDS), st.sampled_from(LAYOUTS[:-1]), st.sampled_from(DTYPES),
    st.integers(0, 999), st.sampled_from((1.0, 2.0, 0.7)), st.booleans(),
)  # fmt: skip
@hypothesis.settings(property_test, max_examples=60)
def test_small(on_cuda, exits, rows, classes, kind, layout, dtype, seed, temperature, log):
    z = [lay_out(x, layout) for x in make_logits(kind, (exits, rows, classes), dtype, seed)]
    check_statistics(z, z, ["cuda"])
    check_softmax(z, z, temperature, log, ["cuda"])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large(on_cuda, shape, dtype):
    z = make_logits("random", shape, dtype, 3)
    check_statistics(z, z, ["cuda"])
    check_softmax(z, z, 2.0, False, ["cuda"])


def test_nan_is_the_prediction(on_cuda):
    z = make_logits("random", (2, 3, 70), torch.float32, 3)
    z[0][1, 40] = z[0][1, 60] = z[1][2, 0] = float("nan")
    out = msdkern.exit_statistics(z)
    expected = torch.stack([x.argmax(-1) for x in z])
    assert torch.equal(out.prediction, expected)
    assert torch.equal(out.confidence.isnan(), torch.stack([x.isnan().any(-1) for x in z]))
    assert torch.equal(msdkern.multi_exit_loss(z).prediction, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 7, 4096, 10001])
@pytest.mark.parametrize("there", [False, True])
def test_scale(on_cuda, dtype, size, there, monkeypatch):
    if there:
        number = lambda self, value, d: (1.0, value.to(cuda.reference.accumulation_dtype(d)))  # noqa: E731
        monkeypatch.setattr(cuda._Cuda, "number", number)
    for factor in (1.0, -0.37):
        x = torch.randn(size + 1).to(dtype)
        data = [x.clone()[1:], x.clone()]  # one of them off a vector's bounds
        expected = [(d.double() * torch.tensor(factor).to(d).double()).to(dtype) for d in data]
        exact = [(d.double() * factor).to(dtype) for d in data]
        cuda.scale_(data, torch.tensor(factor, dtype=torch.float64))
        for ours, true, other in zip(data, exact, expected, strict=True):
            step = torch.finfo(dtype).eps
            assert ((ours.double() - true.double()).abs() <= step * true.double().abs()).all()
            assert factor != 1.0 or torch.equal(ours, other)

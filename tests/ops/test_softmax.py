# SPDX-License-Identifier: Apache-2.0
"""`multi_exit_softmax` on every executor against float64."""

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
    leaves,
    make_logits,
    per_exit,
    property_test,
)
from tests.servers import SERVERS, serve


def softmaxes(z, temperature, log, dtype):
    """Truth or peer: the values and, for upstream gradients, d/dz."""
    z = [x.detach().to(dtype, copy=True).requires_grad_() for x in z]
    function = torch.log_softmax if log else torch.softmax
    return z, [function(x / temperature, -1) for x in z]


def check_softmax(z, given, temperature, log, servers):
    dtype = z[0].dtype
    real = torch.float64 if dtype == torch.float64 else torch.float32
    upstream = [torch.randn(x.shape, generator=generator(k)).to(dtype) for k, x in enumerate(z)]
    exact_z, exact = softmaxes(z, temperature, log, torch.float64)
    peer_z, peer = softmaxes(z, temperature, log, real)
    torch.autograd.backward(exact, [g.double() for g in upstream])
    torch.autograd.backward(peer, [g.to(real) for g in upstream])
    for server in servers:
        leaf = leaves(given)
        with serve(server):
            out = msdkern.multi_exit_softmax(leaf, temperature, log=log)
            torch.autograd.backward(list(out), upstream)
        grads = per_exit(leaf.grad if isinstance(leaf, torch.Tensor) else [x.grad for x in leaf])
        for k, ours in enumerate(out):
            assert ours.dtype == dtype
            reach = (z[k].double() - z[k].double().amax(-1, keepdim=True)).abs() / temperature
            reach = torch.where(reach.isfinite(), reach, 0.0) + 1.0
            p = torch.softmax(z[k].double() / temperature, -1)
            size = reach if log else reach * p
            oracle.check(f"{server} softmax", ours, exact[k], peer[k].to(dtype), size, dtype)
            g = upstream[k].double()
            total = (g if log else g * p).abs().sum(-1, keepdim=True)
            size = (g.abs() * (1.0 if log else p) + reach * p * total) / temperature
            # Backward starts from the outputs, which half precision has rounded.
            size = size * (torch.finfo(dtype).eps / torch.finfo(real).eps)
            theirs = peer_z[k].grad.to(dtype)
            oracle.check(f"{server} gradient", grads[k], exact_z[k].grad, theirs, size, dtype)


@hypothesis.given(
    st.sampled_from((1, 2, 5, 32)), st.integers(0, 4), st.sampled_from(CLASSES),
    st.sampled_from(KINDS), st.sampled_from(LAYOUTS), st.sampled_from(DTYPES),
    st.sampled_from((1.0, 2.0, 0.5, 3.3)), st.booleans(), st.integers(0, 999),
)  # fmt: skip
@hypothesis.settings(property_test, max_examples=100)
def test_values_and_gradient(exits, rows, classes, kind, layout, dtype, temperature, log, seed):
    z = make_logits(kind, (exits, rows, classes), dtype, seed)
    if layout == "stacked":
        given = torch.stack(z)
        z = list(given.unbind(0))
    else:
        given = z = [lay_out(x, layout) for x in z]
    check_softmax(z, given, temperature, log, SERVERS)


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_classes(dtype):
    z = make_logits("random", (2, 2, 20011), dtype)
    for log in (False, True):
        check_softmax(z, z, 1.7, log, SERVERS)


@pytest.mark.parametrize("server", SERVERS)
def test_upstream_gradients_of_any_layout_or_none(server):
    """Only one output is used, through an expanded and a transposed gradient."""
    z = make_logits("random", (3, 4, 5), torch.float64)
    given, plain = leaves(z), leaves(z)
    with serve(server):
        msdkern.multi_exit_softmax(given, 2.0)[1].t().sum(0).sum().backward()
    torch.softmax(plain[1] / 2.0, -1).sum().backward()
    torch.testing.assert_close(given[1].grad, plain[1].grad)
    for k in (0, 2):
        assert given[k].grad is None or not given[k].grad.any()


@pytest.mark.parametrize("server", SERVERS)
def test_temperature_as_a_tensor(server):
    z = make_logits("random", (2, 3, 5), torch.float32)
    with serve(server):
        expected = msdkern.multi_exit_softmax(z, 2.5)
        for dtype in DTYPES:
            t = torch.tensor(2.5, dtype=dtype)
            for ours, theirs in zip(msdkern.multi_exit_softmax(z, t), expected, strict=True):
                assert torch.equal(ours, theirs)

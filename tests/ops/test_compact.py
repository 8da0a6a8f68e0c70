# SPDX-License-Identifier: Apache-2.0
"""`compact_rows` and `scatter_rows`: any dtype, any shape, any layout, and back again."""

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

import msdkern
from tests.cases import generator, property_test
from tests.servers import SERVERS, serve

SHAPES = ((), (1,), (2,), (3, 5), (4, 3, 3), (0,), (2, 2, 2, 2))
DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.int32,
          torch.complex64)  # fmt: skip


def values(shape, dtype, seed):
    g = generator(seed)
    x = torch.randint(0, 100, shape, generator=g)
    return x.to(dtype) if dtype != torch.complex64 else torch.complex(x.float(), -x.float())


@hypothesis.given(
    st.integers(0, 9), st.lists(st.sampled_from(SHAPES), min_size=1, max_size=40),
    st.sampled_from(DTYPES), st.booleans(), st.integers(0, 99),
)  # fmt: skip
@hypothesis.settings(property_test, max_examples=80)
def test_there_and_back(rows, shapes, dtype, strided, seed):
    x = [values((rows, *shape), dtype, seed + i) for i, shape in enumerate(shapes)]
    check_there_and_back(x, strided, seed, SERVERS)


def check_there_and_back(x, strided, seed, servers):
    rows = x[0].shape[0]
    if strided:
        x = [torch.stack([t, t + t], -1)[..., 0] for t in x]
    stays = torch.rand(rows, generator=generator(seed)) < 0.5
    stay = torch.cat([stays.nonzero()[:, 0], (~stays).nonzero()[:, 0]])
    count = int(stays.sum())
    for server in servers:
        with serve(server):
            short = msdkern.compact_rows(x, stay, count)
            full = msdkern.compact_rows(tuple(x), stay, torch.tensor(count))
            back = [torch.zeros_like(t) for t in x]
            assert msdkern.scatter_rows(back, full, stay, torch.tensor(count)) is back
            again = [torch.zeros_like(t) for t in x]
            msdkern.scatter_rows(again, short, stay)
        assert isinstance(short, tuple)
        for t, a, b, c, d in zip(x, short, full, back, again, strict=True):
            keep = stays.view(-1, *[1] * (t.dim() - 1))
            assert torch.equal(a, t[stay[:count]])
            assert torch.equal(b[:count], a)
            assert not b[count:].any()
            assert torch.equal(c, torch.where(keep, t, torch.zeros_like(t)))
            assert torch.equal(d, c)


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("dims", [2, 3])
def test_channels_last_stays_channels_last(dims, server):
    layout = {2: torch.channels_last, 3: torch.channels_last_3d}[dims]
    x = torch.randn(4, 3, *[5] * dims).to(memory_format=layout)
    stay = torch.tensor([1, 3, 0, 2])
    with serve(server):
        for count in (2, torch.tensor(2)):
            y = msdkern.compact_rows(x, stay, count)
            assert y.is_contiguous(memory_format=layout)
            assert torch.equal(y[:2], x[stay[:2]])
        out = torch.zeros_like(x)
        msdkern.scatter_rows(out, y, stay, torch.tensor(2))
    assert torch.equal(out[[1, 3]], x[[1, 3]])
    assert not out[[0, 2]].any()


@pytest.mark.parametrize("server", SERVERS)
def test_a_tensor_comes_back_as_a_tensor_of_its_own(server):
    x = torch.arange(4.0)
    with serve(server):
        y = msdkern.compact_rows(x, torch.arange(4), 4)
    y += 1
    assert x.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("wrong", [-1, 4, 1 << 40])
def test_rows_that_do_not_exist(wrong, server):
    x, index = torch.arange(4.0), torch.tensor([0, wrong, 2, 3])
    with serve(server):
        for call in (
            lambda: msdkern.compact_rows(x, index, 2),
            lambda: msdkern.compact_rows(x, index, torch.tensor(3)),
            lambda: msdkern.scatter_rows(x, x.clone(), index),
        ):
            with pytest.raises(ValueError, match=rf"_rows: rows must be in \[0, 4\); got {wrong}$"):
                call()
        # Past the count nothing is read.
        assert msdkern.compact_rows(x, index, torch.tensor(1)).tolist() == [0, 0, 0, 0]
    assert x.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("server", SERVERS)
def test_rows_of_nothing(server):
    with serve(server):
        y = msdkern.compact_rows(torch.empty(0, 64), torch.zeros(3).long(), torch.tensor(0))
    assert torch.equal(y, torch.zeros(3, 64))

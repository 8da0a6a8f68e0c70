# SPDX-License-Identifier: Apache-2.0
"""`compact_rows` and `scatter_rows` on the executor `cuda`, executed by the harness."""

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

import msdkern
from msdkern.executors import cuda
from tests.cases import property_test
from tests.ops import test_compact as every

SERVER = "cuda"


@hypothesis.given(
    st.integers(1, 9), st.lists(st.sampled_from(every.SHAPES), min_size=1, max_size=36),
    st.sampled_from(every.DTYPES), st.booleans(), st.integers(0, 99),
)  # fmt: skip
@hypothesis.settings(property_test, max_examples=40)
def test_there_and_back(on_cuda, rows, shapes, dtype, strided, seed):
    x = [every.values((rows, *shape), dtype, seed + i) for i, shape in enumerate(shapes)]
    every.check_there_and_back(x, strided, seed, [SERVER])


@pytest.mark.parametrize("bytes_", [1, 16, 1023, 1024, 4096, 16384, 16386, 50000])
def test_rows_of_any_length(on_cuda, bytes_):
    x = [every.values((5, bytes_), torch.uint8, bytes_), every.values((5,), torch.int64, 1)]
    every.check_there_and_back(x, False, 3, [SERVER])


@pytest.mark.parametrize("order", ["lifo", "1", "2", "3"])
def test_every_order_of_threads(on_cuda, order):
    on_cuda.set_order(order.encode())
    x = [every.values((6, n), torch.float32, n) for n in (1, 3, 64, 5000)]
    every.check_there_and_back(x, False, 5, [SERVER])


def test_rows_anywhere(on_cuda):
    """Rows of every alignment, and further apart than they are long."""
    wide = every.values((6, 200), torch.uint8, 0)
    stay = torch.tensor([4, 0, 5, 1, 2, 3])
    for offset in range(17):
        for length in (8, 64, 100):
            x = wide[:, offset : offset + length]
            assert torch.equal(msdkern.compact_rows(x, stay, 3), x[stay[:3]])
            base = torch.zeros(6 * length + 32, dtype=torch.uint8)
            out = base[offset : offset + 6 * length].view(6, length)
            msdkern.scatter_rows(out, x[stay].contiguous(), stay)
            assert torch.equal(out, x)


@pytest.mark.parametrize("test", [every.test_a_tensor_comes_back_as_a_tensor_of_its_own])
def test_what_holds_everywhere(on_cuda, test):
    test(SERVER)


@pytest.mark.parametrize("dims", [2, 3])
def test_channels_last_stays_channels_last(on_cuda, dims):
    every.test_channels_last_stays_channels_last(dims, SERVER)


@pytest.mark.parametrize("wrong", [-1, 4, 1 << 40, -(1 << 40)])
def test_rows_that_do_not_exist(on_cuda, wrong):
    """Gathered as zeros, scattered nowhere, and remembered."""
    x, index = torch.arange(1.0, 5.0), torch.tensor([0, wrong, 2, 3])
    for count in (3, torch.tensor(3)):
        y = msdkern.compact_rows(x, index, count)
        assert y.tolist()[:3] == [1, 0, 3]
        with pytest.raises(ValueError, match=r"^compact_rows, scatter_rows: rows must be those of"):
            cuda.check_indices()
    cuda.check_indices()  # which forgets it
    out = torch.zeros(4)
    msdkern.scatter_rows(out, x, index)
    assert out.tolist() == [1, 0, 3, 4]
    with pytest.raises(ValueError, match=r"got one that does not exist$"):
        cuda.check_indices()
    # Past the count nothing is read.
    assert msdkern.compact_rows(x, index, torch.tensor(1)).tolist() == [1, 0, 0, 0]
    cuda.check_indices()
    cuda.check_labels()


@pytest.mark.parametrize(("count", "kept"), [(-3, 0), (0, 0), (4, 4), (1 << 40, 4)])
def test_a_count_that_cannot_be(on_cuda, count, kept):
    x, index = torch.arange(1.0, 5.0), torch.arange(4)
    expected = [1.0, 2.0, 3.0, 4.0][:kept] + [0.0] * (4 - kept)
    assert msdkern.compact_rows(x, index, torch.tensor(count)).tolist() == expected
    out = torch.zeros(4)
    msdkern.scatter_rows(out, x, index, torch.tensor(count))
    assert out.tolist() == expected


def test_no_rows(on_cuda):
    x, stay = torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)
    assert msdkern.compact_rows(x, stay, 0).shape == (0, 3)
    assert msdkern.compact_rows(torch.zeros(4, 0), torch.arange(4), 2).shape == (2, 0)

# SPDX-License-Identifier: Apache-2.0
"""The gates on the executor `cuda`, executed by the harness: the truth and the cases of every
executor, every way to own a row, several orders of threads."""

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

import msdkern
from msdkern import reference
from msdkern.executors import cuda
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
from tests.ops import test_gate as every

SERVER = "cuda"


@hypothesis.given(
    st.integers(0, 6), st.sampled_from((*CLASSES, 511, 2049, 4100)), st.sampled_from(KINDS),
    st.sampled_from(LAYOUTS[:-1]), st.sampled_from(DTYPES), st.sampled_from(every.MEASURED),
    st.sampled_from((1.0, 0.5, 1.7, 10.0)), st.integers(0, 999),
)  # fmt: skip
@hypothesis.settings(property_test, max_examples=100)
def test_scores(on_cuda, rows, classes, kind, layout, dtype, measure, temperature, seed):
    z = lay_out(make_logits(kind, (1, rows, classes), dtype, seed)[0], layout)
    every.check_scores(z, measure, temperature, [SERVER])


@hypothesis.given(
    st.sampled_from((1, 2, 5)), st.integers(0, 20), st.sampled_from((1, 2, 10, 100)),
    st.sampled_from(KINDS), st.sampled_from(DTYPES), st.sampled_from(reference.MEASURES),
    st.sampled_from(every.THRESHOLDS), st.booleans(), st.integers(0, 999),
)  # fmt: skip
@hypothesis.settings(property_test, max_examples=60)
def test_leaving_one_by_one_is_choosing_afterwards(
    on_cuda, exits, rows, classes, kind, dtype, measure, threshold, several, seed
):
    z = make_logits(kind, (exits, rows, classes), dtype, seed)
    every.check_leaving(z, measure, threshold, several, seed, [SERVER])


@hypothesis.given(
    st.integers(1, 3), st.integers(0, 30), st.sampled_from(("confidence", "patience", "entropy")),
    st.sampled_from(every.THRESHOLDS), st.integers(0, 999),
)  # fmt: skip
@hypothesis.settings(property_test, max_examples=30)
def test_fixed_shapes_give_the_same(on_cuda, exits, rows, measure, threshold, seed):
    z = make_logits("random", (exits, rows, 7), torch.float32, seed)
    every.check_fixed_shapes(z, measure, threshold, [SERVER])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("measure", every.MEASURED)
def test_nan_and_masked_rows(on_cuda, measure, dtype):
    every.test_nan_and_masked_rows(measure, dtype, SERVER)


@pytest.mark.parametrize(
    "test",
    [
        every.test_a_late_maximum_rescales_what_was_summed_before,
        every.test_rows_that_are_not_live_are_not_read,
        every.test_infinite_thresholds,
        every.test_a_threshold_is_compared_in_the_dtype_of_the_score,
        every.test_logits_are_only_read_and_need_no_gradient,
    ],
)
def test_what_holds_everywhere(on_cuda, test):
    test(SERVER)


# The most classes of float32 that each way to own a row serves, threads and blocks; the others
# follow from the bytes of an element.
WAYS = {16: 1, 32: 2, 64: 4, 128: 8, 256: 16, 1024: 32, 4096: 128, 8192: 256, 16384: 512}
WAYS |= {32768: 1024, 70000: 2048}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("measure", ["margin", "entropy"])
def test_every_way_to_own_a_row(on_cuda, measure, dtype):
    for most in WAYS:
        for classes in (most, most + 1) if most < 8192 else (most - 3,):
            z = make_logits("random", (1, 2, classes), dtype, most)[0]
            every.check_scores(z, measure, 1.7, [SERVER])


def test_as_many_classes_as_there_may_be(on_cuda):
    z = make_logits("random", (2, 1, 262144), torch.bfloat16, 1)
    every.check_leaving(z, "confidence", 0.5, False, 0, [SERVER])


@pytest.mark.parametrize("order", ["lifo", "1", "2", "3", "4", "5"])
@pytest.mark.parametrize("classes", [3, 10, 100, 1000, 4096, 17000])
def test_every_order_of_threads(on_cuda, classes, order):
    rows = 2500 if classes == 3 else 5  # several turns of the block that puts them in order
    z = make_logits("random", (2, rows, classes), torch.float32, 4)
    z[0][3, classes // 2] = torch.nan
    expected = (*msdkern.exit_gate(z, 0.2, "margin"), *msdkern.gate_step(z[0], 0.2, "margin"))
    on_cuda.set_order(order.encode())
    found = (*msdkern.exit_gate(z, 0.2, "margin"), *msdkern.gate_step(z[0], 0.2, "margin"))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_neither_other_rows_nor_the_alignment_change_a_row(on_cuda, dtype):
    """To the bit: a row that is gated again among fewer gets the same score."""
    for classes in (7, 100, 1000, 1001, 9001):
        wide = torch.randn(7, classes + 9, generator=generator(classes)).to(dtype)
        for offset in (0, 1, 2, 4, 8):
            view = wide[:, offset : offset + classes]
            together = msdkern.gate_step(view, 0.5, "entropy").score
            alone = [msdkern.gate_step(row[None].clone(), 0.5, "entropy").score for row in view]
            assert torch.equal(together, torch.cat(alone)), (classes, offset)


@pytest.mark.parametrize("rows", [4096, 4097, 20001])
def test_many_rows_take_a_second_launch(on_cuda, rows):
    z = torch.randn(rows, 3, generator=generator(rows))
    live = rows - 1234
    out = msdkern.gate_step(z, 0.6, live=torch.tensor(live))
    stays = (out.score < 0.6) & (torch.arange(rows) < live)
    every.check_order(out, stays)
    assert torch.equal(out.prediction[:live], z[:live].argmax(-1))
    assert 0 < int(out.count) < live


def there(value, dtype):
    """As a GPU's would be, read by the kernel."""
    return [1.0] * value.numel(), value.to(reference.accumulation_dtype(dtype)).contiguous()


def test_numbers_in_device_memory(on_cuda, monkeypatch):
    z = make_logits("random", (3, 6, 40), torch.float32, 2)
    limits, t = torch.tensor([0.4, 0.3, 0.9]), torch.tensor([1.0, 0.5, 2.0])
    calls = (
        lambda: msdkern.exit_gate(z, limits, temperature=t),
        lambda: msdkern.exit_gate(z, limits[0], temperature=t[1]),
        lambda: msdkern.gate_step(z[0], limits[0], temperature=t[2]),
    )
    expected = [value for call in calls for value in call()]
    monkeypatch.setattr(cuda._Cuda, "numbers", lambda self, value, dtype: there(value, dtype))
    found = [value for call in calls for value in call()]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("measure", every.MEASURED)
@pytest.mark.parametrize("t", [0.0, -1.0, torch.nan])
def test_a_temperature_that_cannot_be_makes_nan(on_cuda, monkeypatch, measure, t):
    z = make_logits("random", (1, 3, 20), torch.float32, 2)[0]
    monkeypatch.setattr(cuda._Cuda, "numbers", lambda self, value, dtype: there(value, dtype))
    out = msdkern.gate_step(z, 0.1, measure, temperature=torch.tensor(t))
    assert out.score.isnan().all()
    assert torch.equal(out.prediction, z.argmax(-1))
    assert int(out.count) == 3


def test_a_threshold_of_nan_lets_no_row_leave(on_cuda, monkeypatch):
    z = make_logits("random", (2, 3, 20), torch.float32, 2)
    monkeypatch.setattr(cuda._Cuda, "numbers", lambda self, value, dtype: there(value, dtype))
    threshold = torch.tensor(torch.nan)
    for measure in ("confidence", "entropy"):
        assert int(msdkern.gate_step(z[0], threshold, measure).count) == 3
        assert msdkern.exit_gate(z, threshold, measure).exit_index.tolist() == [1, 1, 1]


@pytest.mark.parametrize(("live", "kept"), [(-1, 0), (3, 3), (9, 4), (1 << 40, 4)])
def test_a_count_of_rows_in_flight_that_cannot_be(on_cuda, live, kept):
    """No row beyond the logits is read."""
    out = msdkern.gate_step(torch.randn(4, 5), torch.inf, live=torch.tensor(live))
    assert int(out.count) == kept
    assert out.stay.tolist() == [0, 1, 2, 3]


def test_a_launch_that_fails_says_why(on_cuda, monkeypatch):
    class Broken:
        gate = staticmethod(lambda *a: cuda.CUDA_ERROR)
        copy_rows = staticmethod(lambda *a: (cuda.CUDA_ERROR, 0))
        last_error = staticmethod(lambda: "out of memory")
        workspace = on_cuda.workspace

    monkeypatch.setattr(cuda, "_load", lambda: (Broken, None))
    with pytest.raises(RuntimeError, match=r"^gate_step: CUDA says: out of memory$"):
        msdkern.gate_step(torch.zeros(1, 2), 0.5)
    with pytest.raises(RuntimeError, match=r"^compact_rows: CUDA says: out of memory$"):
        msdkern.compact_rows(torch.zeros(1), torch.zeros(1, dtype=torch.int64), 1)

# SPDX-License-Identifier: Apache-2.0
"""The gates of executor `triton` in Triton's interpreter: what the tests of the ops do not reach.

Run by test_triton.py in a process of its own, with TRITON_INTERPRET=1, beside the tests of the ops
(tests/ops/test_gate.py and others) on this executor: here are sweeps, batches of many programs,
what device memory may hold that the host does not read, and which addresses are read.
"""

import math

import numpy as np
import pytest
import torch
from triton.runtime import interpreter

import msdkern
from msdkern import reference
from msdkern.executors.triton import gate_launch, table, tensors
from tests import oracle
from tests.cases import DTYPES, KINDS, generator, make_logits
from tests.ops.test_gate import LOW, MEASURED, check_order, definition
from tests.ops.test_statistics import tied_and_nan


@pytest.fixture(autouse=True)
def on_triton():
    with msdkern.executor("triton"):
        yield


@pytest.fixture
def sweeping(monkeypatch):
    """Two tiles of 16 lanes at once, none of which holds a row."""
    monkeypatch.setattr(table, "gate_plan", lambda *a: table.GatePlan(False, 2, 16, 4, 2))


@pytest.mark.parametrize("classes", [16, 53, 131])
@pytest.mark.parametrize("measure", MEASURED)
def test_sweeps(measure, classes, sweeping):
    for i, kind in enumerate(KINDS):
        dtype = DTYPES[i % 4]
        z = make_logits(kind, (1, 3, classes), dtype, i)[0]
        real = reference.accumulation_dtype(dtype)
        true, peer = (definition(z.to(d), 1.7, measure) for d in (torch.float64, real))
        reach = torch.where(z.isfinite(), z.double().abs(), 0.0).amax(-1) / 1.7 + classes**0.5
        out = msdkern.gate_step(z, 0.5, measure, temperature=1.7)
        size = reach if measure in (*LOW, "max_logit") else 1.0
        oracle.check(f"{kind} {measure}", out.score, true, peer, size, dtype)
        assert torch.equal(out.prediction, z.double().argmax(-1))


@pytest.mark.parametrize("measure", [*MEASURED, "patience"])
def test_sweeps_of_rows_without_a_softmax(measure, sweeping):
    """Ties, NaN, infinities, and rows of nothing but the lowest number, as the rows that are held:
    both follow eager."""
    z = tied_and_nan(12, 75, torch.float32, 1)
    z[5] = -torch.inf
    z[6] = -torch.inf
    z[6, 40] = 1.0
    z[7, -1] = torch.inf
    z[8] = torch.finfo(z.dtype).min
    z[9, :70] = torch.finfo(z.dtype).min
    z[10, 60], z[10, 61] = torch.inf, torch.nan
    z[11, 2:] = -torch.inf
    out = msdkern.exit_gate([z, z.flip(1)], 0.9, measure)
    with msdkern.executor("eager"):
        expected = msdkern.exit_gate([z, z.flip(1)], 0.9, measure)
    for found, value in zip(out, expected, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_a_temperature_whose_inverse_is_large(sweeping):
    """x overflows to -inf between lanes whose maxima differ; nothing becomes NaN by it."""
    z = make_logits("random", (1, 4, 70), torch.float32)[0]
    z[1] = 1e38 * torch.linspace(-3.0, 3.0, 70)
    z[2] = z[1].flip(0)
    for measure in MEASURED[:-1]:
        score = msdkern.gate_step(z, 0.5, measure, temperature=1e-30).score
        expected = definition(z.double(), 1e-30, measure)
        torch.testing.assert_close(score.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 16, 17, 100])
def test_many_spans(rows, monkeypatch):
    """Counters, the order over spans, and more counters than are added at once; twice bit-equal."""
    monkeypatch.setattr(gate_launch, "SPAN", 16)
    monkeypatch.setattr(table, "gate_plan", lambda *a: table.GatePlan(True, 4, 8, 4))
    z = make_logits("random", (1, rows, 5), torch.float32)[0]
    for threshold in (-torch.inf, 0.6, torch.inf):
        out, again = (msdkern.gate_step(z, threshold) for _ in range(2))
        check_order(out, out.score < threshold)
        assert all(torch.equal(a, b) for a, b in zip(out, again, strict=True))
    live = torch.tensor(rows // 2)
    out = msdkern.gate_step(z, torch.inf, live=live)
    check_order(out, torch.arange(rows) < live)


def test_counters_are_left_at_zero():
    z = make_logits("random", (1, 70, 5), torch.float32)[0]
    counters = tensors.tickets(z, 1)
    for _ in range(2):
        msdkern.gate_step(z, 0.5)
        assert not counters.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_by_value_and_in_memory(dtype, monkeypatch):
    """As on a GPU: numbers of the host by value (in float64 through memory), one tensor for all
    exits, or one of K."""
    z = make_logits("random", (3, 9, 7), dtype)
    limits, t = torch.tensor([0.3, 0.4, 0.5], dtype=torch.float64), [1.0, 2.0, 0.5]
    expected = msdkern.exit_gate(z, limits, temperature=t)
    kept = tensors.per_exit

    def by_value(value, exits, like):
        class OnGpu:
            device, dtype = torch.device("meta"), like.dtype
            new_empty = staticmethod(like.new_empty)

        return kept(value, exits, OnGpu)

    monkeypatch.setattr(gate_launch, "per_exit", by_value)
    found = msdkern.exit_gate(z, limits, temperature=t)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    one = msdkern.exit_gate(z, 0.4, temperature=2.0)
    monkeypatch.setattr(gate_launch, "per_exit", kept)
    same = msdkern.exit_gate(z, torch.full((3,), 0.4), temperature=torch.tensor(2.0))
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))


def test_values_that_only_the_device_knows(monkeypatch):
    """Where nothing may be read on the host: no row leaves by what is no number."""
    monkeypatch.setattr(gate_launch, "checks_values", lambda x: False)
    monkeypatch.setattr(tensors, "checks_values", lambda x: False)
    z = torch.randn(2, 4, 5, generator=generator(0))
    nan, negative = torch.tensor(math.nan), torch.tensor(-1.0)
    for options in ({"threshold": nan}, {"threshold": -torch.inf, "temperature": negative}):
        assert msdkern.exit_gate(z, **options).exit_index.tolist() == [1] * 4
        assert int(msdkern.gate_step(z[0], **options).count) == 4
    x, index = torch.arange(1.0, 5.0), torch.tensor([3, -1, 1 << 40, 4])
    assert msdkern.compact_rows(x, index, 4).tolist() == [4, 0, 0, 0]
    msdkern.scatter_rows(x, 10 * x.clone(), index)
    assert x.tolist() == [1, 2, 3, 10]
    for count, kept in ((9, 4), (-1, 0)):
        y = msdkern.compact_rows(x, torch.arange(4), torch.tensor(count))
        assert y.tolist() == [*x[:kept].tolist(), *[0] * (4 - kept)]
        step = msdkern.gate_step(z[0], torch.inf, live=torch.tensor(count))
        assert int(step.count) == kept


@pytest.mark.parametrize("count", [-1, 5])
def test_counts_out_of_range(count):
    x, index, n = torch.arange(4.0), torch.arange(4), torch.tensor(count)
    for call, name in (
        (lambda: msdkern.gate_step(x[:, None], 0.5, live=n), "gate_step: live"),
        (lambda: msdkern.compact_rows(x, index, n), "compact_rows: count"),
        (lambda: msdkern.scatter_rows(x, x, index, n), "scatter_rows: count"),
    ):
        with pytest.raises(ValueError, match=f"^{name} must be between 0 and 4; got {count}$"):
            call()


# Memory -----------------------------------------------------------------------------------------


@pytest.fixture
def accesses(monkeypatch):
    """The address of every element that is loaded or stored, in order."""
    found = {"load": [], "store": []}
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def watched_load(self, ptrs, mask, *rest):
        found["load"] += ptrs.data[np.asarray(mask.data)].tolist()
        return load(self, ptrs, mask, *rest)

    def watched_store(self, ptrs, value, mask, *rest):
        found["store"] += ptrs.data[np.asarray(mask.data)].tolist()
        return store(self, ptrs, value, mask, *rest)

    monkeypatch.setattr(builder, "create_masked_load", watched_load)
    monkeypatch.setattr(builder, "create_masked_store", watched_store)
    return found


def inside(addresses, x):
    """Which elements of x were touched, by their place in it, in order."""
    first, size = x.data_ptr(), x.element_size()
    return sorted((a - first) // size for a in addresses if first <= a < first + x.numel() * size)


@pytest.mark.parametrize("sweep", [False, True])
@pytest.mark.parametrize("measure", reference.MEASURES)
def test_every_logit_is_read_once_and_none_of_rows_that_have_left(
    measure, sweep, request, accesses
):
    if sweep:
        request.getfixturevalue("sweeping")
    z = [2.0 * torch.randn(9, 39, generator=generator(k)) for k in range(3)]
    score = torch.rand(3, 9, generator=generator(3)) if measure == "score" else None
    limit = {"entropy": 2.5, "normalized_entropy": 0.7, "max_logit": 4.5, "patience": 1.0}
    out = msdkern.exit_gate(z, limit.get(measure, 0.4), measure, score=score)
    assert int((out.exit_index == 0).sum()) > 0 or measure == "patience"
    assert int((out.exit_index == 2).sum()) > 0
    for k, x in enumerate(z):
        rows = (out.exit_index >= k).nonzero()[:, 0].tolist()
        assert inside(accesses["load"], x) == [r * 39 + c for r in rows for c in range(39)]


@pytest.mark.parametrize("sweep", [False, True])
def test_rows_that_are_not_in_flight_are_not_read(sweep, request, accesses):
    if sweep:
        request.getfixturevalue("sweeping")
    z = torch.randn(9, 39, generator=generator(0))
    msdkern.gate_step(z, 0.3, live=torch.tensor(5))
    assert inside(accesses["load"], z) == list(range(5 * 39))


@pytest.mark.parametrize("tail", [3, 4, 8, 17])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float16, torch.float32, torch.float64])
def test_rows_are_copied_once_in_the_widest_words(dtype, tail, accesses):
    x, index = torch.arange(6 * tail).reshape(6, tail).to(dtype), torch.tensor([4, 0, 5, 2])
    (y,) = msdkern.compact_rows((x,), index, 4)
    word = math.gcd(16, tail * x.element_size(), x.data_ptr(), y.data_ptr())
    touched = {"load": inside(accesses["load"], x), "store": inside(accesses["store"], y)}
    step = max(1, min(word, 8) // x.element_size())  # 16 bytes are two numbers of 8
    rows = {"load": sorted(index.tolist()), "store": range(4)}
    for kind, elements in touched.items():
        expected = [r * tail + c for r in rows[kind] for c in range(0, tail, step)]
        assert elements == expected, kind
    assert torch.equal(y, x[index])


def test_rows_anywhere_in_memory():
    """Rows further apart than they are long, and rows that are not one piece of memory."""
    wide = torch.arange(120.0).reshape(6, 4, 5)
    index, count = torch.tensor([4, 0, 5, 2, 1, 3]), torch.tensor(4)
    for x in (
        wide[:, 1:3],
        wide[::2],
        wide.transpose(1, 2),
        wide[:, :, ::2],
        wide[:1].expand(6, 4, 5),
    ):
        chosen = index[index < len(x)]
        y = msdkern.compact_rows(x, chosen, count if len(x) == 6 else torch.tensor(3))
        used = 4 if len(x) == 6 else 3
        assert torch.equal(y[:used], x[chosen[:used]])
    for part in (lambda t: t[:, 1:3], lambda t: t.transpose(1, 2), lambda t: t[:, :, ::2]):
        out, values = torch.zeros(6, 4, 5), part(wide)
        assert msdkern.scatter_rows(part(out), values[index], index, count) is not None
        expected = torch.zeros(6, 4, 5)
        part(expected)[index[:4]] = values[index[:4]]
        assert torch.equal(out, expected)


def test_more_tensors_than_one_launch_copies():
    tensors = [torch.arange(3.0) + i for i in range(gate_launch.TENSORS + 3)]
    found = msdkern.compact_rows(tensors, torch.tensor([2, 0]), 2)
    assert [t.tolist() for t in found] == [[2.0 + i, 0.0 + i] for i in range(len(tensors))]

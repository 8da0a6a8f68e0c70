# SPDX-License-Identifier: Apache-2.0
"""`exit_gate` and `gate_step` on every executor: scores in float64, decisions by definition."""

import math

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

import msdkern
from msdkern import reference
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
from tests.ops.test_statistics import tied_and_nan
from tests.servers import SERVERS, serve

MEASURED = ("confidence", "margin", "entropy", "normalized_entropy", "max_logit")
LOW = ("entropy", "normalized_entropy")
THRESHOLDS = (-torch.inf, torch.inf, 0.0, 0.3, 0.6, 1.0, 2.0)


def definition(z, temperature, measure):
    """The score in the dtype of z, written out; independent of msdkern.reference."""
    z = z / temperature
    p = torch.softmax(z, -1)
    top = p.sort(-1, descending=True).values
    entropy = torch.special.entr(p).sum(-1)
    classes = z.shape[-1]
    return {
        "confidence": lambda: top[:, 0],
        "margin": lambda: top[:, 0] - top[:, 1] if classes > 1 else top[:, 0],
        "entropy": lambda: entropy,
        "normalized_entropy": lambda: entropy / math.log(classes) if classes > 1 else entropy,
        "max_logit": lambda: z.max(-1).values,
    }[measure]()  # fmt: skip


def decide(scores, threshold, measure):
    """Rows of [K, N] scores, one after the other: the first exit that fires, else the last."""
    low = measure in LOW
    index = []
    for row in scores.t().tolist():
        limits = zip(row, threshold.tolist(), strict=True)
        fired = [s <= t if low else s >= t for s, t in limits]
        index.append([*fired[:-1], True].index(True))
    return torch.tensor(index, dtype=torch.int64)


@hypothesis.given(
    st.integers(0, 6), st.sampled_from((*CLASSES, 511, 2049, 4100)), st.sampled_from(KINDS),
    st.sampled_from(LAYOUTS[:-1]), st.sampled_from(DTYPES), st.sampled_from(MEASURED),
    st.sampled_from((1.0, 0.5, 1.7, 10.0)), st.integers(0, 999),
)  # fmt: skip
@hypothesis.settings(property_test, max_examples=150)
def test_scores(rows, classes, kind, layout, dtype, measure, temperature, seed):
    z = lay_out(make_logits(kind, (1, rows, classes), dtype, seed)[0], layout)
    check_scores(z, measure, temperature, SERVERS)


def check_scores(z, measure, temperature, servers):
    """One exit's answers, and the order of the rows."""
    classes, dtype = z.shape[1], z.dtype
    real = reference.accumulation_dtype(dtype)
    true = definition(z.double(), temperature, measure)
    peer = definition(z.to(real), temperature, measure)
    reach = torch.where(z.isfinite(), z.double().abs(), 0.0).amax(-1) / temperature + classes**0.5
    size = reach if measure in (*LOW, "max_logit") else 1.0
    for server in servers:
        with serve(server):
            out = msdkern.gate_step(z, 0.5, measure, temperature=temperature)
        assert out.score.dtype == real
        oracle.check(f"{server} {measure}", out.score, true, peer, size, dtype)
        assert torch.equal(out.prediction, z.double().argmax(-1)), server
        fired = out.score <= 0.5 if measure in LOW else out.score >= 0.5
        check_order(out, ~fired)


def check_order(out, stays):
    everyone = torch.arange(len(stays))
    assert int(out.count) == int(stays.sum())
    assert out.count.shape == ()
    assert torch.equal(out.stay, torch.cat([everyone[stays], everyone[~stays]]))


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("measure", MEASURED)
def test_nan_and_masked_rows(measure, dtype, server):
    """NaN in the score wherever there is no softmax; the prediction is that of torch.argmax."""
    for classes in (1, 2, 9, 64, 100, 513, 2500):
        z = tied_and_nan(24, classes, dtype, classes)
        z[5] = -torch.inf
        z[6] = -torch.inf
        z[6, classes // 2] = 1.0
        z[7, -1] = torch.inf
        with serve(server):
            out = msdkern.gate_step(z, 0.5, measure)
        expected = definition(z.double(), 1.0, measure)
        assert torch.equal(out.prediction, z.float().argmax(-1)), classes
        assert torch.equal(out.score.isnan(), expected.isnan()), classes
        torch.testing.assert_close(
            out.score.double(), expected, rtol=1e-5, atol=1e-5, equal_nan=True
        )
        fired = out.score <= 0.5 if measure in LOW else out.score >= 0.5
        check_order(out, ~fired)


@pytest.mark.parametrize("server", SERVERS)
def test_a_late_maximum_rescales_what_was_summed_before(server):
    z = torch.linspace(-300.0, 50.0, 9000).repeat(2, 1)
    z[1, 7000] = 60.0
    with serve(server):
        for measure in MEASURED:
            score = msdkern.gate_step(z, 0.5, measure, temperature=3.0).score
            expected = definition(z.double(), 3.0, measure)
            torch.testing.assert_close(score.double(), expected, rtol=2e-5, atol=1e-6)


@hypothesis.given(
    st.sampled_from((1, 2, 5)), st.integers(0, 20), st.sampled_from((1, 2, 10, 100)),
    st.sampled_from(KINDS), st.sampled_from(DTYPES), st.sampled_from(reference.MEASURES),
    st.sampled_from(THRESHOLDS), st.booleans(), st.integers(0, 999),
)  # fmt: skip
@hypothesis.settings(property_test, max_examples=80)
def test_leaving_one_by_one_is_choosing_afterwards(
    exits, rows, classes, kind, dtype, measure, threshold, several, seed
):
    z = make_logits(kind, (exits, rows, classes), dtype, seed)
    check_leaving(z, measure, threshold, several, seed, SERVERS)


def check_leaving(z, measure, threshold, several, seed, servers):
    """gate_step with compaction, exit_gate over everything, and a choice among all scores."""
    exits, (rows, _), dtype = len(z), z[0].shape, z[0].dtype
    if rows > 1:
        z[seed % exits][seed % rows, 0] = torch.nan
    g = generator(seed)
    real = reference.accumulation_dtype(dtype)
    score = torch.rand(exits, rows, generator=g, dtype=real) if measure == "score" else None
    limits = [threshold + (0.1 * k if several else 0.0) for k in range(exits)]
    t = [1.0 + (0.5 * k if several else 0.0) for k in range(exits)]
    for server in servers:
        with serve(server):
            whole = msdkern.exit_gate(
                z, limits if several else threshold, measure, temperature=t, score=score
            )
            scores, predictions = all_scores(z, measure, t, score)
            early = leave_one_by_one(z, limits, measure, t, score)
        index = decide(scores, torch.tensor(limits, dtype=real), measure)
        assert torch.equal(whole.exit_index, index)
        assert torch.equal(whole.prediction, predictions.gather(0, index[None])[0])
        chosen = scores.gather(0, index[None])[0]
        torch.testing.assert_close(whole.score, chosen, rtol=0, atol=0, equal_nan=True)
        for found, expected in zip(early, whole, strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def all_scores(z, measure, temperature, score):
    scores, predictions, previous = [], [], None
    for k, x in enumerate(z):
        given = None if score is None else score[k]
        step = msdkern.gate_step(
            x, 0.5, measure, temperature=temperature[k], score=given, previous=previous
        )
        previous = step if measure == "patience" else None
        scores.append(step.score)
        predictions.append(step.prediction)
    return torch.stack(scores), torch.stack(predictions)


def leave_one_by_one(z, limits, measure, temperature, score):
    n, exits = z[0].shape[0], len(z)
    real = reference.accumulation_dtype(z[0].dtype)
    index, prediction = (torch.full((n,), -1) for _ in range(2))
    found = torch.full((n,), torch.nan, dtype=real)
    rows, previous = torch.arange(n), None
    for k in range(exits):
        given = None if score is None else score[k][rows]
        step = msdkern.gate_step(
            z[k][rows], limits[k], measure, temperature=temperature[k], score=given,
            previous=previous,
        )  # fmt: skip
        values = (torch.full_like(rows, k), step.prediction, step.score)
        msdkern.scatter_rows((index, prediction, found), values, rows)
        if measure == "patience":
            previous = msdkern.compact_rows(
                (step.prediction, step.score), step.stay, int(step.count)
            )
        rows = msdkern.compact_rows(rows, step.stay, int(step.count))
    return index, prediction, found


@hypothesis.given(
    st.integers(1, 3), st.integers(0, 30), st.sampled_from(("confidence", "patience", "entropy")),
    st.sampled_from(THRESHOLDS), st.integers(0, 999),
)  # fmt: skip
@hypothesis.settings(property_test, max_examples=60)
def test_fixed_shapes_give_the_same(exits, rows, measure, threshold, seed):
    z = make_logits("random", (exits, rows, 7), torch.float32, seed)
    check_fixed_shapes(z, measure, threshold, SERVERS)


def check_fixed_shapes(z, measure, threshold, servers):
    """Nothing is read on the host between the exits, and every tensor keeps N rows."""
    rows = z[0].shape[0]
    for server in servers:
        with serve(server):
            expected = msdkern.exit_gate(z, threshold, measure)
            out = (torch.full((rows,), -1), torch.full((rows,), -1), torch.zeros(rows))
            index, live, previous = torch.arange(rows), None, None
            for k, x in enumerate(z):
                mine = msdkern.compact_rows(x, index, torch.tensor(rows) if live is None else live)
                step = msdkern.gate_step(mine, threshold, measure, previous=previous, live=live)
                values = (torch.full_like(index, k), step.prediction, step.score)
                alive = torch.tensor(rows) if live is None else live
                msdkern.scatter_rows(out, values, index, alive)
                index, *previous = msdkern.compact_rows(
                    (index, step.prediction, step.score), step.stay, step.count
                )
                previous, live = previous if measure == "patience" else None, step.count
                assert len(index) == rows
        for found, value in zip(out, expected, strict=True):
            torch.testing.assert_close(found, value, rtol=0, atol=0)


@pytest.mark.parametrize("server", SERVERS)
def test_rows_that_are_not_live_are_not_read(server):
    z = torch.randn(5, 4, generator=generator(0))
    z[3:] = torch.nan
    with serve(server):
        out = msdkern.gate_step(z, torch.inf, live=torch.tensor(3))
        none = msdkern.gate_step(z, -torch.inf, live=torch.tensor(0))
    assert out.stay.tolist() == [0, 1, 2, 3, 4]
    assert int(out.count) == 3
    assert out.prediction.tolist()[3:] == [-1, -1]
    assert out.score[3:].isnan().all()
    assert int(none.count) == 0
    assert none.stay.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("server", SERVERS)
def test_infinite_thresholds(server):
    z = torch.randn(2, 6, 5, generator=generator(1))
    z[0, 2] = torch.nan
    with serve(server):
        for measure, always in (("confidence", -torch.inf), ("entropy", torch.inf)):
            out = msdkern.exit_gate(z, always, measure)
            assert out.exit_index.tolist() == [0, 0, 1, 0, 0, 0]  # a NaN score stays
            assert msdkern.exit_gate(z, -always, measure).exit_index.tolist() == [1] * 6
            assert msdkern.gate_step(z[0], always, measure).stay.tolist() == [2, 0, 1, 3, 4, 5]


@pytest.mark.parametrize("server", SERVERS)
def test_a_threshold_is_compared_in_the_dtype_of_the_score(server):
    """As PyTorch compares a float32 tensor with a number: 0.9 is the float32 next to it."""
    score = torch.tensor([0.9, 0.3, 0.1], dtype=torch.float32)
    with serve(server):
        for s in [*score.tolist(), 0.9, 0.3, 0.1]:
            out = msdkern.gate_step(torch.zeros(3, 2), s, "score", score=score)
            assert torch.equal(out.stay[int(out.count) :], (score >= s).nonzero()[:, 0])


@pytest.mark.parametrize("server", SERVERS)
def test_bit_equal_for_any_number_of_threads(server):
    z = torch.randn(300, 1000, generator=generator(3))
    before = torch.get_num_threads()
    with serve(server):
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(msdkern.gate_step(z, 0.05, "entropy"))
        torch.set_num_threads(before)
    if server != "eager":
        assert all(torch.equal(a, b) for out in found for a, b in zip(out, found[0], strict=True))


@pytest.mark.parametrize("server", SERVERS)
def test_logits_are_only_read_and_need_no_gradient(server):
    z = torch.randn(2, 3, 4, requires_grad=True)
    before = z.detach().clone()
    with serve(server):
        outputs = [*msdkern.exit_gate(z, 0.5), *msdkern.gate_step(z[0], 0.5)]
    assert not any(value.requires_grad for value in outputs)
    assert torch.equal(z, before)

# SPDX-License-Identifier: Apache-2.0
"""The stream refills its batches, keeps its promise of waiting times, and answers everyone."""

import torch

from msdkern import infer
from tests.infer.networks import Table, tables


def half_leave(rows):
    """Exit 1 is sure of the even rows, exit 2 of those divisible by 3."""
    z = torch.zeros(3, rows, 2)
    z[0, ::2, 0] = z[1, ::3, 0] = 9.0
    return z


def test_deep_stages_run_full_batches():
    model = Table(half_leave(64), nested=True)
    stream = infer.Stream(infer.AdaptiveRunner(model, 0.9), 8)
    answers = list(stream.answer(torch.arange(64).split(8)))
    assert len(answers) == 64
    assert stream.pending == 0
    assert model.seen[0] == [8] * 8
    assert model.seen[1] == [8] * 4  # 32 rows in 4 batches; batch by batch it would be 8
    assert model.seen[2] == [8, 8, 5]
    assert {a.exit_index for a in answers if a.ticket % 2 == 0} == {0}


def test_a_row_waits_no_longer_than_promised():
    now = [0.0]
    model = Table(half_leave(6))
    runner = infer.AdaptiveRunner(model, 0.9)
    stream = infer.Stream(runner, 4, max_wait=1.0, now=lambda: now[0])
    assert list(stream.submit(torch.tensor([1, 2]))) == [0, 1]
    assert stream.step() is None
    now[0] = 1.0
    assert [(a.ticket, a.exit_index) for a in stream.step()] == [(1, 0)]
    assert stream.step() is None  # row 1 waits in front of stage 2 since now
    assert list(stream.submit(torch.tensor([3]))) == [2]
    now[0] = 2.0
    assert stream.step() == []  # row 1 passes exit 2
    assert stream.pending == 2
    now[0] = 3.5
    assert [a.ticket for a in stream.drain()] == [0, 2]
    assert stream.pending == 0
    assert stream.step() is None


def test_single_rows_and_rows_larger_than_a_batch():
    z = tables(2, 10, 3, 1)
    runner = infer.AdaptiveRunner(Table(z), 0.7)
    whole = runner(torch.arange(10))
    for batch in (1, 3, 100):
        stream = infer.Stream(runner, batch)
        stream.submit(torch.arange(10))
        stream.submit(torch.arange(0))
        found = sorted(stream.drain())
        assert [a.exit_index for a in found] == whole.exit_index.tolist()
        assert [a.prediction for a in found] == whole.prediction.tolist()

# SPDX-License-Identifier: Apache-2.0
"""Answers at a deadline, by a clock that the test turns."""

import pytest
import torch

from msdkern import infer
from msdkern.infer.anytime import deadline_curve
from tests.infer.networks import Table, tables


class Slow(torch.nn.Module):
    """A stage that takes a second per row of its clock, times its depth."""

    def __init__(self, stage, clock, seconds):
        super().__init__()
        self.stage, self.clock, self.seconds = stage, clock, seconds

    def forward(self, features, logits):
        self.clock[0] += self.seconds * len(features)
        return self.stage(features, logits)


@pytest.fixture
def runner():
    clock, z = [0.0], tables(3, 8, 4, 0)
    model = Table(z)
    stages = [Slow(s, clock, t) for s, t in zip(model.stages, (1.0, 2.0, 3.0), strict=True)]
    model.stages = torch.nn.ModuleList(stages)
    found = infer.AnytimeRunner(model, margin=1.0, now=lambda: clock[0])
    found.z = z
    return found


def test_the_deepest_exit_that_fits(runner):
    x = torch.arange(2)
    runner.prepare(x)
    for seconds, exit_index, passed in (
        (12.0, 2, 12.0), (11.9, 1, 6.0), (6.0, 1, 6.0), (5.9, 0, 2.0), (0.0, 0, 2.0),
        (-1.0, 0, 2.0), (float("inf"), 2, 12.0),
    ):  # fmt: skip
        found = runner(x, seconds)
        assert (found.exit_index, found.seconds) == (exit_index, passed)
        assert torch.equal(found.logits, runner.z[exit_index][:2])
        assert torch.equal(found.prediction, runner.z[exit_index][:2].argmax(-1))


def test_nothing_is_known_after_one_cold_run(runner):
    runner.prepare(torch.arange(2), repeats=0)
    assert runner.estimate(1, 2) == runner.estimate(1, 3) == 0.0


def test_sizes_not_seen_are_estimated_by_rows(runner):
    assert runner.estimate(1, 4) == 0.0
    runner.prepare(torch.arange(2))
    assert runner.estimate(1, 2) == 4.0
    assert runner.estimate(1, 4) == 8.0
    assert runner.estimate(1, 1) == 4.0  # no faster than what was seen
    assert runner(torch.arange(4), 11.9).exit_index == 0


def test_the_slowest_of_the_last_runs_counts(runner):
    x = torch.arange(1)
    runner.prepare(x)
    runner.taken[1][1].append(50.0)
    assert runner(x, 20.0).exit_index == 0
    for _ in range(10):
        runner(x, float("inf"))
    assert runner(x, 20.0).exit_index == 2


def test_accuracy_rises_with_the_deadline(runner):
    x = torch.arange(8)
    runner.prepare(x)
    target = runner.z[-1].argmax(-1)
    curve = deadline_curve(runner, x, target, [8.0, 24.0, 48.0])
    assert [point["exit"] for point in curve] == [1, 2, 3]
    assert curve[-1]["accuracy"] == 1.0
    assert [point["seconds"] for point in curve] == [8.0, 24.0, 48.0]


def test_a_real_clock_keeps_a_real_deadline():
    model = Table(tables(3, 8, 4, 0))
    runner = infer.AnytimeRunner(model)
    runner.prepare(torch.arange(8))
    assert runner(torch.arange(8), 60.0).exit_index == 2
    assert runner(torch.arange(8), 0.0).exit_index == 0

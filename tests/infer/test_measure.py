# SPDX-License-Identifier: Apache-2.0
"""How time is taken, with calls that say themselves how long they took."""

from types import SimpleNamespace

import pytest
import torch

from msdkern.infer import AdaptiveRunner, measure
from tests.infer.networks import Table, tables

BATCHES = [(torch.arange(4), torch.zeros(4)), (torch.arange(4, 6), torch.zeros(2))]


def test_calls_take_turns_at_every_batch_and_the_fastest_counts():
    order = []

    def call(name, seconds):
        taken = iter(seconds)

        def run(images):
            order.append(f"{name}{len(images)}")
            found = next(taken)
            return found, f"{name} {found}"

        return run

    calls = [call("a", [3.0, 1.0, 2.0, 6.0]), call("b", [7.0, 8.0, 5.0, 4.0])]
    a, b = measure.in_turn(calls, BATCHES, repeats=2)
    assert order == ["a4", "b4", "a4", "b4", "a2", "b2", "a2", "b2"]
    assert a == [(1.0, "a 1.0"), (2.0, "a 2.0")]
    assert b == [(7.0, "b 7.0"), (4.0, "b 4.0")]


def test_the_whole_network_by_stages():
    model = Table(tables(3, 6, 4, 0))
    trained = SimpleNamespace(model=model, device=torch.device("cpu"))
    [runs] = measure.in_turn([measure.whole_network(trained)], BATCHES, repeats=2)
    assert model.seen == [[4, 4, 2, 2]] * 3
    assert all(seconds == sum(stages) and len(stages) == 3 for seconds, stages in runs)
    found = measure.cumulative_milliseconds([(3.0, [1.0, 2.0]), (0.75, [0.5, 0.25])], 10)
    assert found == pytest.approx([150.0, 375.0])


def test_leaving_early_adds_up_over_batches():
    z = torch.zeros(3, 6, 2)
    z[0, :3, 0] = z[1, :5, 0] = 9.0
    z[2, :, 1] = 9.0
    runner = AdaptiveRunner(Table(z), 0.9)
    [runs] = measure.in_turn([measure.leaving_early(runner)], BATCHES)
    found = measure.summary(runs, BATCHES, [10.0, 20.0, 60.0])
    assert found["share"] == [3 / 6, 2 / 6, 1 / 6]
    assert found["accuracy"] == 5 / 6
    assert found["madds"] == pytest.approx((3 * 10 + 2 * 20 + 60) / 6)
    assert 0 < found["stage_milliseconds"] < found["milliseconds"]
    reports = [report for _, (_, report) in runs]
    assert [report.left for report in reports] == [[3, 1, 0], [0, 1, 1]]

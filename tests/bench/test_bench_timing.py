# SPDX-License-Identifier: Apache-2.0
"""Timing: blocks, turns and what is dropped, seen through a clock that ticks once per call."""

import pytest
import torch

from bench import timing
from bench.cases import Case
from bench.contenders import Contender
from bench.problem import Problem


class TickClock:
    """Time passes only when a contender says so."""

    def __init__(self):
        self.now = 0.0

    def chill(self):
        pass

    def stamp(self):
        return self.now

    def settle(self):
        pass

    def seconds(self, begin, end):
        return end - begin


@pytest.fixture
def clock(monkeypatch):
    clock = TickClock()
    monkeypatch.setattr(timing, "clock_for", lambda device: clock)
    return clock


def contender(clock, name, cost, log, first=0.0):
    """Costs `cost` per call, and `first` more after somebody else or after another phase."""
    before = []

    def call():
        phase = torch.is_grad_enabled()
        cold = log[-1:] != [name] or before[-1:] != [phase]
        clock.now += cost + (first if cold else 0.0)
        log.append(name)
        before.append(phase)
        return problem_of.logits[0].sum()

    return Contender(name, "eager", call, call)


problem_of = Problem(Case("small", 1, 2, 3, pair="none"))


def test_the_first_call_of_a_block_is_dropped(clock):
    log = []
    both = [contender(clock, name, 0.001, log, first=1.0) for name in ("a", "b")]
    problem = Problem(Case("small", 1, 2, 3, family="statistics"))
    samples = timing.measure(both, problem, 0.0)
    for name in ("a", "b"):
        assert samples[name]["forward"] == pytest.approx([0.001] * len(samples[name]["forward"]))


def test_contenders_take_turns_in_blocks_of_five(clock):
    log = []
    both = [contender(clock, name, 0.001, log) for name in ("a", "b")]
    problem = Problem(Case("small", 1, 2, 3, family="statistics"))
    samples = timing.measure(both, problem, 0.0)
    assert len(samples["a"]["forward"]) == 4 * timing.FEWEST_BLOCKS
    timed = log[4:]  # two calls each to plan
    blocks = [timed[i : i + 5] for i in range(0, len(timed), 5)]
    assert all(len(set(block)) == 1 for block in blocks)
    assert sorted(block[0] for block in blocks) == ["a"] * 3 + ["b"] * 3


def test_loss_has_three_phases_that_add_up(clock):
    log = []
    both = [contender(clock, name, 0.001, log, first=1.0) for name in ("a", "b")]
    samples = timing.measure(both, problem_of, 0.0)["a"]
    assert set(samples) == {"forward", "backward", "both"}
    assert samples["backward"] == [0.0] * len(samples["backward"])
    assert samples["both"] == pytest.approx([0.001] * len(samples["both"]))


def test_a_slow_contender_runs_short_blocks_and_sits_out(clock, monkeypatch):
    log = []
    found = [contender(clock, name, 0.001, log) for name in ("a", "b", "c")]
    found.append(contender(clock, "slow", 0.5, log))
    ticks = iter(range(1000))
    monkeypatch.setattr(timing, "perf_counter", lambda: next(ticks))
    problem = Problem(Case("small", 1, 2, 3, family="statistics"))
    samples = timing.measure(found, problem, 30)
    assert len(samples["slow"]["forward"]) == timing.FEWEST_BLOCKS
    assert len(samples["a"]["forward"]) > 4 * timing.FEWEST_BLOCKS


def test_who_is_left_out_is_not_called(clock):
    log = []
    wrong = contender(clock, "wrong", 0.001, log)
    wrong.left_out = "value is wrong"
    samples = timing.measure([contender(clock, "a", 0.001, log), wrong], problem_of, 0.0)
    assert set(samples) == {"a"}
    assert "wrong" not in log


def test_forward_is_timed_without_a_graph():
    seen = []
    problem = Problem(Case("small", 1, 2, 3, family="statistics"))
    call = lambda: seen.append(torch.is_grad_enabled())  # noqa: E731
    timing.measure([Contender("a", "eager", call, call)], problem, 0.0)
    assert seen
    assert not any(seen)


def test_summary_is_the_median_and_its_spread():
    values = [float(i) for i in range(11)][::-1]
    assert timing.summary(values) == {"median": 5.0, "low": 1.0, "high": 9.0, "samples": 11}

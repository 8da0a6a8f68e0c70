# SPDX-License-Identifier: Apache-2.0
"""Interleaved timing: warm blocks of calls, taken in turns, medians with their spread.

A block is five calls of one contender, the first of which is dropped: it warms what the contender
before left cold. Blocks of all contenders take turns over many rounds, so that a slow minute of
the machine meets everybody. A contender much slower than the others sits out rounds in between and
runs shorter blocks, so that it does not take all the time.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from time import perf_counter
from typing import Any, Protocol

import torch

from .cases import READ_ONLY
from .contenders import Contender
from .problem import Problem

BLOCK = 5
SLOW_SECONDS = 0.1  # calls longer than this run in blocks of two
FEWEST_BLOCKS = 3
SLOWER_SITS_OUT = 4  # costs this many times the median before it sits out rounds

Samples = dict[str, list[float]]


class Clock(Protocol):
    """Takes stamps during a block and says afterwards how many seconds lie between them."""

    def chill(self) -> None: ...

    def stamp(self) -> Any: ...

    def settle(self) -> None: ...

    def seconds(self, begin: Any, end: Any) -> float: ...


class HostClock:
    """Wall clock; every CPU kernel has finished when its call returns."""

    def chill(self) -> None:
        """Nothing: blocks are warm, as the results say."""

    stamp = staticmethod(perf_counter)

    def settle(self) -> None:
        """Nothing is pending on a CPU."""

    def seconds(self, begin: float, end: float) -> float:
        """Difference of two stamps."""
        return end - begin


def clock_for(device: str) -> Clock:
    """The clock of a device type."""
    if device != "cuda":
        return HostClock()
    from .device import DeviceClock

    return DeviceClock()


def _forward_block(contender: Contender, problem: Problem, clock: Clock, calls: int) -> Samples:
    stamps = []
    with torch.no_grad():
        for _ in range(calls):
            problem.rotate()
            clock.chill()
            begin = clock.stamp()
            contender.infer()
            stamps.append((begin, clock.stamp()))
    clock.settle()
    return {"forward": [clock.seconds(a, b) for a, b in stamps[1:]]}


def _both_block(contender: Contender, problem: Problem, clock: Clock, calls: int) -> Samples:
    stamps = []
    for _ in range(calls):
        problem.rotate()
        clock.chill()
        begin = clock.stamp()
        outputs = contender.train()
        middle = clock.stamp()
        problem.gradients(outputs)
        stamps.append((begin, middle, clock.stamp()))
    clock.settle()
    return {
        "both": [clock.seconds(a, c) for a, _, c in stamps[1:]],
        "backward": [clock.seconds(b, c) for _, b, c in stamps[1:]],
    }


def _blocks(problem: Problem) -> list[Callable[..., Samples]]:
    return [_forward_block] if problem.case.family in READ_ONLY else [_forward_block, _both_block]


class _Turn:
    """A contender's samples, and how often it takes part."""

    def __init__(self, contender: Contender) -> None:
        self.contender = contender
        self.samples: Samples = {}
        self.blocks = 0
        self.every = 1
        self.calls = BLOCK
        self.cost = 0.0

    def run(self, problem: Problem, clock: Clock, calls: int) -> Samples:
        """One block of every phase."""
        found: Samples = {}
        with self.contender.session():
            for block in _blocks(problem):
                found |= block(self.contender, problem, clock, calls)
        return found

    def plan(self, problem: Problem, clock: Clock) -> None:
        """Measures once, unrecorded, what a round costs."""
        samples = self.run(problem, clock, 2)
        longest = max(values[0] for values in samples.values())
        self.calls = 2 if longest > SLOW_SECONDS else BLOCK
        self.cost = self.calls * sum(values[0] for values in samples.values())

    def record(self, problem: Problem, clock: Clock) -> None:
        """One block of every phase, kept."""
        for phase, values in self.run(problem, clock, self.calls).items():
            self.samples.setdefault(phase, []).extend(values)
        self.blocks += 1


def measure(
    contenders: Iterable[Contender], problem: Problem, seconds: float
) -> dict[str, Samples]:
    """Seconds per call, by contender and phase, from interleaved blocks.

    Phases: `forward` (no grad), `backward` (autograd alone) and `both` (forward and backward).
    Runs for about `seconds`, and longer where that would leave fewer than three blocks each.
    """
    clock = clock_for(problem.case.device)
    turns = [_Turn(c) for c in contenders if c.left_out is None]
    for turn in turns:
        turn.plan(problem, clock)
    typical = SLOWER_SITS_OUT * statistics.median(turn.cost for turn in turns)
    for turn in turns:
        turn.every = max(1, round(turn.cost / typical))
    end = perf_counter() + seconds
    round_ = 0
    while perf_counter() < end or any(turn.blocks < FEWEST_BLOCKS for turn in turns):
        late = perf_counter() >= end
        for turn in turns:
            if turn.blocks < FEWEST_BLOCKS if late else round_ % turn.every == 0:
                turn.record(problem, clock)
        turns = turns[1:] + turns[:1]  # nobody always follows the same neighbour
        round_ += 1
    return {turn.contender.name: turn.samples for turn in turns}


def summary(values: list[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile in seconds, and how many calls they come from."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return {
        "median": statistics.median(ordered),
        "low": ordered[round(0.1 * last)],
        "high": ordered[round(0.9 * last)],
        "samples": len(ordered),
    }

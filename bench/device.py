# SPDX-License-Identifier: Apache-2.0
"""Timing on a GPU: cold caches, rotating buffers, CUDA graphs, and the host's time by itself.

`forward`, `backward` and `both` are device time between events, each call on another copy of the
logits and after a write that has replaced the second-level cache. Launches that the host cannot
issue fast enough are in it, as they are in training. `graph` is device time of forward and backward
replayed from a CUDA graph, without them; `host` is what a call takes of the host's time.
"""

from __future__ import annotations

from collections.abc import Iterable
from time import perf_counter
from typing import Any

import torch

from .contenders import Contender
from .problem import Problem

CACHES = 2  # the write that cools, and all copies together, are so many caches large
MOST_COPIES = 8
GRAPH_BYTES = 64 << 20  # logits beyond this hide every launch: no graph is needed
REPLAYS = 20
HOST_CALLS = 20


def cache_bytes(cuda: Any = torch.cuda) -> int:
    """Size of the second-level cache."""
    return int(getattr(cuda.get_device_properties(0), "L2_cache_size", 0)) or 64 << 20


class DeviceClock:
    """CUDA events, read once per block so that no call waits for the one before it."""

    def __init__(self, cuda: Any = torch.cuda, device: str = "cuda") -> None:
        self.cuda = cuda
        size = CACHES * cache_bytes(cuda)
        self.cold = torch.empty(size, dtype=torch.int8, device=device)

    def chill(self) -> None:
        """Replaces what the cache holds, in the current stream."""
        self.cold.zero_()

    def stamp(self) -> Any:
        """An event in the current stream."""
        event = self.cuda.Event(enable_timing=True)
        event.record()
        return event

    def settle(self) -> None:
        """Waits for all stamps of a block."""
        self.cuda.synchronize()

    def seconds(self, begin: Any, end: Any) -> float:
        """Device time between two events."""
        return begin.elapsed_time(end) / 1e3


def copies_of(size: int, cache: int) -> int:
    """How many copies of logits of this size do not fit into the cache together."""
    return max(1, min(MOST_COPIES, -(-CACHES * cache // max(1, size))))


def prepare(problem: Problem, cuda: Any = torch.cuda) -> None:
    """Gives the problem its copies."""
    problem.multiply(copies_of(problem.bytes, cache_bytes(cuda)))


def _step(contender: Contender, problem: Problem) -> None:
    problem.rotate()
    if problem.case.family == "statistics":
        with torch.no_grad():
            contender.infer()
    else:
        problem.gradients(contender.train())


def graph_seconds(contender: Contender, problem: Problem, cuda: Any = torch.cuda) -> list[float]:
    """Device seconds per forward and backward: replays of one graph of a call per copy."""
    side = cuda.Stream()
    side.wait_stream(cuda.current_stream())
    with cuda.stream(side):
        for _ in range(3):
            _step(contender, problem)
    cuda.current_stream().wait_stream(side)
    graph = cuda.CUDAGraph()
    with cuda.graph(graph):
        for _ in range(problem.copies):
            _step(contender, problem)
    stamps = []
    for _ in range(REPLAYS + 1):
        begin, end = (cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        stamps.append((begin, end))
    cuda.synchronize()
    return [a.elapsed_time(b) / 1e3 / problem.copies for a, b in stamps[1:]]


def host_seconds(contender: Contender, problem: Problem, cuda: Any = torch.cuda) -> list[float]:
    """Seconds that the host is busy with a forward and backward, the device idle before it."""
    found = []
    for _ in range(HOST_CALLS + 1):
        cuda.synchronize()
        begin = perf_counter()
        _step(contender, problem)
        found.append(perf_counter() - begin)
    cuda.synchronize()
    return found[1:]


def measure_more(
    made: Iterable[Contender],
    problem: Problem,
    times: dict[str, dict[str, list[float]]],
    cuda: Any = torch.cuda,
) -> None:
    """Adds the phases `host` and, for small logits, `graph`. Who cannot be captured says why."""
    for contender in made:
        if contender.left_out is not None:
            continue
        with contender.session():
            samples = times.setdefault(contender.name, {})
            samples["host"] = host_seconds(contender, problem, cuda)
            if problem.bytes > GRAPH_BYTES:
                continue
            try:
                samples["graph"] = graph_seconds(contender, problem, cuda)
            except Exception as error:  # a contender that cannot be captured is timed without
                first = (str(error).strip().splitlines() or [""])[0]
                contender.facts["no_graph"] = f"{type(error).__name__}: {first}"
                cuda.synchronize()

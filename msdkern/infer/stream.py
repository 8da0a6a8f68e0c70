# SPDX-License-Identifier: Apache-2.0
"""A server's loop: rows come one by one, and every stage waits until its batch is full again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from msdkern.infer.answers import Clock
from msdkern.infer.budgeted import AdaptiveRunner
from msdkern.infer.gates import (
    State,
    compact,
    cut,
    device_of,
    join,
    rows_of,
    run_stage,
)
from msdkern.ops.gate import GateStep


class Answer(NamedTuple):
    """One row's: the number that `submit` gave it, exit (0-based), prediction and score."""

    ticket: int
    exit_index: int
    prediction: int
    score: float


class _Waiting(NamedTuple):
    """Rows in front of a stage, and when they came there."""

    state: State
    tickets: list[int]
    since: float


class Stream:
    """Adaptive inference for a stream of rows: batches are refilled as rows leave.

    In a batch that is run to its end, the deep stages compute the few rows that are left. Here
    rows that pass an exit wait in front of the next stage until ``batch_size`` of them have
    gathered, so every stage runs full batches. A row waits at most ``max_wait`` seconds in front of
    a stage, as long as somebody calls `step`.

    Args:
        runner: model and thresholds. Its report counts this stream, too.
        batch_size: rows that a stage takes at once.
        max_wait: seconds after which a stage runs with fewer; inf: only `drain` runs those.
        now: the clock, in seconds.

    Raises: ValueError with one sentence.
    """

    def __init__(
        self,
        runner: AdaptiveRunner,
        batch_size: int,
        max_wait: float = float("inf"),
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"Stream: batch_size must be at least 1; got {batch_size!r}")
        if not max_wait >= 0:
            raise ValueError(f"Stream: max_wait must not be negative; got {max_wait!r}")
        self.runner, self.batch_size, self.max_wait, self.now = runner, batch_size, max_wait, now
        self.queues: list[list[_Waiting]] = [[] for _ in runner.stages]
        self.tickets = 0

    @property
    def pending(self) -> int:
        """Rows that have not been answered."""
        return sum(self._length(k) for k in range(len(self.queues)))

    def submit(self, x: Any) -> range:
        """Rows to be answered, and their tickets, in order."""
        rows = rows_of("Stream", x)
        tickets = range(self.tickets, self.tickets + rows)
        self.tickets += rows
        if rows:
            self.queues[0].append(_Waiting(State(x, []), list(tickets), self.now()))
        return tickets

    def step(self) -> list[Answer] | None:
        """Runs the deepest stage that has a full batch, or rows that waited long enough.

        Returns the rows that left there; None where no stage is ready.
        """
        late = self.now() - self.max_wait
        for k in reversed(range(len(self.queues))):
            queue = self.queues[k]
            if self._length(k) >= self.batch_size or (queue and queue[0].since <= late):
                return self._run(k)
        return None

    def drain(self) -> Iterator[Answer]:
        """Answers everything that is pending; the shallow stages first, so that batches fill up."""
        while self.pending:
            answers = self.step()
            if answers is None:
                shallow = next(k for k in range(len(self.queues)) if self.queues[k])
                answers = self._run(shallow)
            yield from answers

    def answer(self, source: Iterable[Any]) -> Iterator[Answer]:
        """Answers for all rows of a source of batches, in the order in which they leave."""
        for x in source:
            self.submit(x)
            while (answers := self.step()) is not None:
                yield from answers
        yield from self.drain()

    def _length(self, k: int) -> int:
        return sum(len(waiting.tickets) for waiting in self.queues[k])

    def _take(self, k: int) -> _Waiting:
        """Up to a batch of the rows that wait longest."""
        taken, room = [], self.batch_size
        while self.queues[k] and room:
            first = self.queues[k].pop(0)
            if len(first.tickets) > room:
                rest = _Waiting(cut(first.state, room, None), first.tickets[room:], first.since)
                self.queues[k].insert(0, rest)
                first = first._replace(
                    state=cut(first.state, 0, room), tickets=first.tickets[:room]
                )
            taken.append(first)
            room -= len(first.tickets)
        tickets = [ticket for waiting in taken for ticket in waiting.tickets]
        return _Waiting(join([waiting.state for waiting in taken]), tickets, taken[0].since)

    def _run(self, k: int) -> list[Answer]:
        runner, began = self.runner, time.perf_counter()
        (features, logits, memory, _), tickets, _ = self._take(k)
        with runner.inference():
            clock = Clock(device_of(features))
            stage = runner.stages[k]
            features, logits = run_stage("Stream", stage, k, features, logits, len(tickets))
            runner.report.stage_seconds[k] += clock.lap()
            step = runner.gates.step(k, features, logits, memory)
            count = int(step.count) if k < len(self.queues) - 1 else 0
            if count:
                kept, waiting = State(features, logits, runner.gates.memory(step)), tickets
                if count < len(tickets):
                    kept = compact(kept, step.stay, count)._replace(origin=None)
                    waiting = [tickets[i] for i in step.stay[:count].tolist()]
                self.queues[k + 1].append(_Waiting(kept, waiting, self.now()))
        report = runner.report
        report.entered[k] += len(tickets)
        report.left[k] += len(tickets) - count
        report.calls += 1
        report.seconds += time.perf_counter() - began
        return _answers(step, k, count, tickets)


def _answers(step: GateStep, k: int, count: int, tickets: list[int]) -> list[Answer]:
    """The rows behind the first ``count`` of the order: those that leave at exit k."""
    if count == len(tickets):
        return []
    rows: Tensor = torch.arange(len(tickets)) if count == 0 else step.stay[count:]
    rows = rows.to(step.score.device)
    columns = (rows, step.prediction[rows], step.score[rows])
    triples = zip(*(column.tolist() for column in columns), strict=True)
    return [Answer(tickets[row], k, prediction, score) for row, prediction, score in triples]

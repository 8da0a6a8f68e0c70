# SPDX-License-Identifier: Apache-2.0
"""Anytime prediction: the deepest answer that can be had by a deadline."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from msdkern.infer.answers import Clock
from msdkern.infer.gates import Inference, device_of, rows_of, run_stage, stages_of

KEPT = 8  # measurements of a stage and batch size that the next estimate is made from


class Anytime(NamedTuple):
    """The logits [N, C] of the exit (0-based) that answered, and the seconds that passed."""

    logits: Tensor
    prediction: Tensor
    exit_index: int
    seconds: float


class AnytimeRunner:
    """Answers a batch by a deadline, with the deepest exit that can be reached until then.

    A stage cannot be interrupted, so it is begun only if its estimate fits: the slowest of its last
    8 runs at this batch size, or, at a size not yet seen, of all sizes by rows. `prepare` measures
    before the first deadline. Exit 1 always answers: nothing can be said earlier.

    Args:
        model: has ``stages``, as for `AdaptiveRunner`.
        margin: the estimates are multiplied by this.
        now: the clock, in seconds.

    Raises: ValueError, TypeError with one sentence.
    """

    def __init__(
        self,
        model: nn.Module,
        margin: float = 1.1,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.model, self.stages = model, stages_of("AnytimeRunner", model)
        self.inference = Inference(model, self.stages)
        if not margin > 0:
            raise ValueError(f"AnytimeRunner: margin must be positive; got {margin!r}")
        self.margin, self.now = margin, now
        self.taken: list[dict[int, list[float]]] = [{} for _ in self.stages]

    def prepare(self, x: Any, repeats: int = 3) -> None:
        """Runs all stages on this batch, to know what they take."""
        for _ in range(repeats + 1):
            self(x, float("inf"))
        for known in self.taken:
            known[rows_of("AnytimeRunner", x)].pop(0)  # the first run warms what is cold

    def estimate(self, k: int, rows: int) -> float:
        """Seconds that stage k (0-based) may take for so many rows; 0 while nothing is known."""
        known = self.taken[k]
        if known.get(rows):
            return self.margin * max(known[rows])
        larger = [max(v) for n, v in known.items() if v and n >= rows]
        smaller = [max(v) * rows / max(n, 1) for n, v in known.items() if v and n < rows]
        found = min(larger) if larger else max(smaller, default=0.0)
        return self.margin * found

    def __call__(self, x: Any, seconds: float) -> Anytime:
        """The deepest answers for x that are there ``seconds`` from now (inf: the last exit's)."""
        op = "AnytimeRunner"
        if not isinstance(seconds, (int, float)) or seconds != seconds:
            raise ValueError(f"{op}: seconds must be a number; got {seconds!r}")
        began, rows = self.now(), rows_of(op, x)
        device = device_of(x)
        logits: list[Tensor] = []
        features = x
        with self.inference():
            clock = Clock(device)
            for k, stage in enumerate(self.stages):
                if k and self.now() - began + self.estimate(k, rows) > seconds:
                    break
                clock.lap()
                before = self.now()
                features, logits = run_stage(op, stage, k, features, logits)
                clock.lap()  # waits for the device
                known = self.taken[k].setdefault(rows, [])
                known.append(self.now() - before)
                del known[:-KEPT]
        answer = logits[-1]
        return Anytime(answer, answer.argmax(-1), len(logits) - 1, self.now() - began)


def deadline_curve(
    runner: AnytimeRunner, x: Any, target: Tensor, deadlines: Sequence[float]
) -> list[dict[str, float]]:
    """Accuracy against the deadline, on one batch: what anytime prediction is judged by."""
    found = []
    for deadline in deadlines:
        out = runner(x, deadline)
        right = float((out.prediction == target).double().mean())
        found.append(
            {"deadline": deadline, "accuracy": right, "exit": out.exit_index + 1,
             "seconds": out.seconds}
        )  # fmt: skip
    return found

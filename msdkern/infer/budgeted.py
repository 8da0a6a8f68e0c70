# SPDX-License-Identifier: Apache-2.0
"""Budgeted batch classification: at every exit the sure rows leave and the batch shrinks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from msdkern.calibrate.files import Thresholds
from msdkern.infer.answers import Answers, Clock, Report
from msdkern.infer.gates import (
    Gates,
    Inference,
    Score,
    State,
    compact,
    device_of,
    rows_of,
    run_stage,
    stages_of,
)
from msdkern.ops.gate import GateStep


class AdaptiveRunner:
    """Runs a multi-exit model and stops working on a row once an exit is sure enough of it.

    ``runner(x)`` gives what `msdkern.exit_gate` would choose among the logits of all exits, in the
    order of the rows of x, but a stage computes only the rows that no earlier exit answered.

    Args:
        model: has ``stages``, each ``(features, logits) -> (features, logits + [new])``, where
            features are a tensor or any nest of tensors whose first axis are the rows. It is run
            in evaluation mode.
        thresholds: what `msdkern.calibrate.load` returns, or one number, or K. The last is not
            used.
        measure, temperature: as in `msdkern.exit_gate`; taken from the thresholds where these
            come from a file.
        score: for ``measure="score"``: ``score(k, features, logits) -> [n]``, the score at exit k
            (0-based) of the rows in flight.
        madds: [K] cumulative multiply-adds up to each exit (`msdkern.models.multiply_adds`), for
            the report.

    ``runner.report`` counts who left where, and sets measured time beside predicted multiply-adds.

    Raises: ValueError, TypeError with one sentence.
    """

    def __init__(
        self,
        model: nn.Module,
        thresholds: Thresholds | float | Sequence[float] | Tensor,
        measure: str = "confidence",
        *,
        temperature: float | Sequence[float] | Tensor = 1.0,
        score: Score | None = None,
        madds: Sequence[float] | None = None,
    ) -> None:
        op = "AdaptiveRunner"
        self.model, self.stages = model, stages_of(op, model)
        self.inference = Inference(model, self.stages)
        self.gates = Gates(op, len(self.stages), thresholds, measure, temperature, score)
        self.report = Report.empty(len(self.stages), madds)

    def __call__(self, x: Any) -> Answers:
        """Answers for one batch, from one row to thousands; none for an empty one."""
        op = "AdaptiveRunner"
        rows, device = rows_of(op, x), device_of(x)
        report, last = self.report, len(self.stages) - 1
        clock, whole = Clock(device), Clock(device)
        answers: Answers | None = None
        with self.inference():
            logits: list[Tensor] = []
            # The rows in flight, by their places in x; None while that is all of them.
            features, index, previous = x, None, None
            for k, stage in enumerate(self.stages):
                clock.lap()
                features, logits = run_stage(op, stage, k, features, logits, rows)
                report.stage_seconds[k] += clock.lap()
                step = self.gates.step(k, features, logits, previous)
                count = int(step.count) if k < last else 0
                report.entered[k] += rows
                report.left[k] += rows - count
                if count < rows or not count:
                    answers = _answered(answers, index, k, step)
                if count == 0:
                    break
                previous = self.gates.memory(step)
                if count < rows:
                    state = State(features, logits, previous, index)
                    features, logits, previous, index = compact(state, step.stay, count)
                rows = count
        report.seconds += whole.lap()
        report.calls += 1
        assert answers is not None  # the last exit answers
        return answers

    def run(self, batches: Iterable[Any]) -> Answers:
        """Answers for all rows of several batches, one after the other."""
        parts = [self(x) for x in batches]
        if not parts:
            raise ValueError("AdaptiveRunner: there must be at least one batch; got none")
        return Answers(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _answered(answers: Answers | None, index: Tensor | None, k: int, step: GateStep) -> Answers:
    """Answers with those of exit k to all rows in flight; of some, a deeper exit knows better."""
    if answers is None or index is None:
        return Answers(torch.full_like(step.prediction, k), step.prediction, step.score)
    answers.exit_index.index_fill_(0, index, k)
    answers.prediction.index_copy_(0, index, step.prediction)
    answers.score.index_copy_(0, index, step.score)
    return answers

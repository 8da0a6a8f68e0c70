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
    Score,
    compact,
    device_of,
    inference,
    rows_of,
    run_stage,
    stages_of,
)
from msdkern.ops.compact import scatter_rows


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
        self.modules = list(model.modules())
        self.gates = Gates(op, len(self.stages), thresholds, measure, temperature, score)
        self.report = Report.empty(len(self.stages), madds)

    def __call__(self, x: Any) -> Answers:
        """Answers for one batch, from one row to thousands; none for an empty one."""
        rows = rows_of("AdaptiveRunner", x)
        clock = Clock(device_of(x))
        whole = Clock(device_of(x))
        answers = None
        with inference(self.modules):
            index = torch.arange(rows, device=device_of(x))
            logits: list[Tensor] = []
            features, previous = x, None
            for k, stage in enumerate(self.stages):
                clock.lap()
                features, logits = run_stage("AdaptiveRunner", stage, k, features, logits)
                self.report.stage_seconds[k] += clock.lap()
                step = self.gates.step(k, features, logits, previous)
                if answers is None:
                    answers = _blank(rows, step.score)
                # Rows in flight are answered at every exit; the deepest that they reach remains.
                values = (torch.full_like(index, k), step.prediction, step.score)
                scatter_rows(answers, values, index)
                count = int(step.count) if k < len(self.stages) - 1 else 0
                self.report.entered[k] += len(index)
                self.report.left[k] += len(index) - count
                memory = self.gates.memory(step)
                if count == 0:
                    break
                if count < len(index):
                    state = (features, logits, index, memory)
                    features, logits, index, memory = compact(state, step.stay, count)
                previous = memory or None
        self.report.seconds += whole.lap()
        self.report.calls += 1
        assert answers is not None  # there is at least one stage
        return answers

    def run(self, batches: Iterable[Any]) -> Answers:
        """Answers for all rows of several batches, one after the other."""
        parts = [self(x) for x in batches]
        if not parts:
            raise ValueError("AdaptiveRunner: there must be at least one batch; got none")
        return Answers(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _blank(rows: int, score: Tensor) -> Answers:
    index, prediction = (torch.full((rows,), -1, device=score.device) for _ in range(2))
    return Answers(index, prediction, score.new_full((rows,), torch.nan))

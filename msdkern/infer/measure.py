# SPDX-License-Identifier: Apache-2.0
"""What running everything and leaving early take on a data set, measured in turn."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from msdkern.infer.answers import Answers, Clock, Report
from msdkern.infer.budgeted import AdaptiveRunner
from msdkern.train.batches import Normalise, in_order
from msdkern.train.data import Rows

if TYPE_CHECKING:
    from msdkern.train.evaluate import Trained

BATCH_SIZE = 512
REPEATS = 3  # of which the fastest counts

Batches = list[tuple[Tensor, Tensor]]
Timed = Callable[[Tensor], tuple[float, Any]]  # images in; seconds, and what was found


def batches_of(trained: Trained, rows: Rows, size: int = BATCH_SIZE) -> Batches:
    """Normalised images and labels, in order."""
    config = trained.config
    normalise = Normalise(trained.dataset, trained.device, config.channels_last)
    return list(in_order(rows, normalise, size, trained.device))


def precision(trained: Trained) -> contextlib.AbstractContextManager:
    """The network computes as `evaluate` has it compute: in bfloat16 where --amp is on."""
    return torch.autocast(trained.device.type, torch.bfloat16, enabled=trained.config.amp)


def in_turn(
    calls: Sequence[Timed], batches: Batches, repeats: int = REPEATS
) -> list[list[tuple[float, Any]]]:
    """Of every call and batch, the fastest of a few runs: [calls][batches].

    The calls take turns at every batch: what else the computer does meets all of them alike.
    """
    found: list[list[tuple[float, Any]]] = [[] for _ in calls]
    for images, _ in batches:
        rounds = [[call(images) for call in calls] for _ in range(repeats)]
        for i, runs in enumerate(zip(*rounds, strict=True)):
            found[i].append(min(runs, key=itemgetter(0)))
    return found


def whole_network(trained: Trained) -> Timed:
    """Computes every exit of every row; finds the seconds of each stage."""

    @torch.no_grad()
    def run(images: Tensor) -> tuple[float, list[float]]:
        taken, clock = [], Clock(trained.device)
        logits: list[Tensor] = []
        features: Any = images
        for stage in trained.model.stages:
            features, logits = stage(features, logits)
            taken.append(clock.lap())
        return sum(taken), taken

    return run


def cumulative_milliseconds(runs: list[tuple[float, list[float]]], rows: int) -> list[float]:
    """Milliseconds of a row until each exit: [K]."""
    stages = [sum(column) for column in zip(*(taken for _, taken in runs), strict=True)]
    return [1e3 * seconds / max(rows, 1) for seconds in itertools.accumulate(stages)]


def leaving_early(runner: AdaptiveRunner) -> Timed:
    """Answers every row by the runner; finds the answers and the runner's report."""

    def run(images: Tensor) -> tuple[float, tuple[Answers, Report]]:
        runner.report.clear()
        answers = runner(images)
        return runner.report.seconds, (answers, replace(runner.report))

    return run


def summary(
    runs: list[tuple[float, tuple[Answers, Report]]], batches: Batches, madds: Sequence[float]
) -> dict[str, Any]:
    """Accuracy, shares, cost and time per row of a runner's run over all batches."""
    rows = max(sum(len(labels) for _, labels in batches), 1)
    pairs = zip(runs, batches, strict=True)
    right = sum(int((out.prediction == labels).sum()) for (_, (out, _)), (_, labels) in pairs)
    reports = [report for _, (_, report) in runs]
    share = [sum(left) / rows for left in zip(*(report.left for report in reports), strict=True)]
    return {
        "accuracy": right / rows,
        "madds": sum(s * m for s, m in zip(share, madds, strict=True)),
        "milliseconds": 1e3 * sum(seconds for seconds, _ in runs) / rows,
        "stage_milliseconds": 1e3 * sum(sum(r.stage_seconds) for r in reports) / rows,
        "share": share,
    }

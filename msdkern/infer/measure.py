# SPDX-License-Identifier: Apache-2.0
"""What leaving early gives on a data set: accuracy, multiply-adds, and measured time beside."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from msdkern import models
from msdkern.calibrate import files
from msdkern.infer.answers import Answers
from msdkern.infer.budgeted import AdaptiveRunner
from msdkern.train.batches import Normalise, in_order
from msdkern.train.data import Rows

if TYPE_CHECKING:
    from msdkern.train.evaluate import Trained

BATCH_SIZE = 512
REPEATS = 3  # of which the fastest counts


def batches_of(trained: Trained, rows: Rows) -> list[tuple[Tensor, Tensor]]:
    """Normalised images and labels, in order."""
    config = trained.config
    normalise = Normalise(trained.dataset, trained.device, config.channels_last)
    return list(in_order(rows, normalise, BATCH_SIZE, trained.device))


def fastest(call: Callable[[], Any]) -> float:
    """Seconds of the fastest of a few calls."""
    taken = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return min(taken)


@torch.no_grad()
def stage_milliseconds(trained: Trained, batches: list[tuple[Tensor, Tensor]]) -> list[float]:
    """Milliseconds per row up to each exit, all rows computed: [K], cumulative."""
    rows = max(sum(len(labels) for _, labels in batches), 1)

    def run(depth: int) -> None:
        for images, _ in batches:
            logits: list[Tensor] = []
            features = images
            for stage in trained.model.stages[:depth]:
                features, logits = stage(features, logits)

    depths = range(1, trained.model.exits + 1)
    return [1e3 * fastest(functools.partial(run, depth)) / rows for depth in depths]


def answer(runner: AdaptiveRunner, batches: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """Accuracy, shares, multiply-adds and milliseconds per row of a runner on these batches."""
    found: list[Answers] = []

    def run() -> None:
        runner.report.clear()
        found[:] = [runner(images) for images, _ in batches]

    seconds = fastest(run)
    rows = max(runner.report.rows, 1)
    pairs = zip(found, batches, strict=True)
    right = sum(int((out.prediction == labels).sum()) for out, (_, labels) in pairs)
    return {
        "accuracy": right / rows,
        "madds": runner.report.mean_madds,
        "milliseconds": 1e3 * seconds / rows,
        "share": runner.report.share,
        "rows": runner.report.rows,
    }


def adaptive_report(trained: Trained, path: str) -> dict[str, Any]:
    """Leaving early by a file of thresholds on all held-out rows, beside running everything.

    Raises ``CommandError`` for a file that belongs to another model or data set.
    """
    thresholds = files.load(path, trained.model, trained.dataset.fingerprint)
    batches = batches_of(trained, trained.dataset.held_out)
    madds = models.multiply_adds(trained.model, trained.dataset.input_shape)
    runner = AdaptiveRunner(trained.model, thresholds, madds=madds)
    report = answer(runner, batches)
    whole = stage_milliseconds(trained, batches)[-1]
    return {
        **report,
        "whole": {"madds": madds[-1], "milliseconds": whole},
        "thresholds": list(thresholds.thresholds),
        "measure": thresholds.measure,
    }


def sentence(report: dict[str, Any]) -> str:
    """The adaptive report as one line."""
    from msdkern.train.report import count

    whole = report["whole"]
    return (
        f"leaving early: {100 * report['accuracy']:.2f} % right,"
        f" {count(report['madds'])} of {count(whole['madds'])} multiply-adds a row,"
        f" {report['milliseconds']:.3g} ms of {whole['milliseconds']:.3g} ms"
    )

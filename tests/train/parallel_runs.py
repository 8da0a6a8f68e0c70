# SPDX-License-Identifier: Apache-2.0
"""Trains one run after the other in the processes of one torchrun; no test by itself.

``parallel_runs.py FILE``: a JSON list of ``{"arguments": [...], "stop": STEP or null,
"kill": STEP or null}``. Batch
normalisation, which depends on how the rows are spread over processes, becomes group
normalisation, and seven rows in ten are ignored.
"""

import contextlib
import dataclasses
import json
import os
import signal
import sys
from pathlib import Path

import torch
from torch import nn

from msdkern import models
from msdkern.cli import main
from msdkern.train import data, loop, parallel
from msdkern.train.config import TrainConfig

original = {"create": models.create, "load": data.load, "finite": loop.finite}


def without_batch_norm(module: nn.Module) -> nn.Module:
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, nn.GroupNorm(1, child.num_features))
        without_batch_norm(child)
    return module


def mostly_ignored(config: TrainConfig) -> data.Dataset:
    dataset = original["load"](config)
    rows = dataset.train
    chance = torch.rand(len(rows), generator=torch.Generator().manual_seed(1))
    labels = torch.where(chance < 0.7, -100, rows.labels)
    return dataclasses.replace(dataset, train=data.Rows(rows.images, labels))


def stopping_at(step: int | None, kill: int | None):
    """Both processes stop at a step, or the second one is killed, unless it was before."""

    def finite(run):
        if run.step == kill and parallel.rank() == 1 and not restarted():
            os.kill(os.getpid(), signal.SIGKILL)
        if run.step == step:
            raise parallel.agreed("stopped")
        return original["finite"](run)

    return finite


def restarted() -> bool:
    return os.environ["TORCHELASTIC_RESTART_COUNT"] != "0"


@contextlib.contextmanager
def patched():
    models.create = lambda *args, **options: without_batch_norm(
        original["create"](*args, **options)
    )
    data.load = mostly_ignored
    yield
    models.create, data.load, loop.finite = original.values()


def run_all(runs: list[dict]) -> None:
    with patched(), parallel.process_group("cpu"):
        for run in runs:
            loop.finite = stopping_at(run["stop"], run.get("kill"))
            status = main(["train", *run["arguments"]])
            if status != (0 if run["stop"] is None else 1):
                sys.exit(f"process {os.environ.get('RANK')}: {run}: ended with {status}")


if __name__ == "__main__":
    run_all(json.loads(Path(sys.argv[1]).read_text()))

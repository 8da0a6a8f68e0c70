# SPDX-License-Identifier: Apache-2.0
"""Trains one run after the other in the processes of one torchrun; no test by itself.

``parallel_runs.py FILE``: a JSON list of ``{"arguments": [...]}`` and, where asked for,

- ``stop``: all processes stop behind this step; ``kill``: the second one is killed there;
- ``copy``: [FROM, TO], a folder that is copied first, as if its run had not finished;
- ``damage``: what then happens to its last checkpoint, a key of DAMAGES;
- ``locked``: another run is writing the folder;
- ``status``: what the command must return, 0 unless stopped.

Batch normalisation, which depends on how the rows are spread over processes, becomes group
normalisation, and seven rows in ten are ignored. Graphs are compiled without generating code. The
bytes that the third step hands to collectives and sends are in bytes-RANK.json beside the log.
"""

import contextlib
import dataclasses
import functools
import json
import os
import pickle
import shutil
import signal
import sys
from collections import Counter
from pathlib import Path

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from msdkern import models
from msdkern.cli import main
from msdkern.train import checkpoint, data, loop, parallel
from msdkern.train.config import TrainConfig
from msdkern.train.files import FolderLock

original = {
    "create": models.create,
    "load": data.load,
    "finite": loop.finite,
    "train_step": loop.train_step,
    "compile": torch.compile,
}


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


# Faults ---------------------------------------------------------------------------------------


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


class Harm:
    """What a pickle can do to its reader."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def truncate(last: Path) -> None:
    """The largest file of the checkpoint loses its end."""
    files = [last] if last.is_file() else list(last.iterdir())
    largest = max(files, key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size - 1000)


def pickled(last: Path) -> None:
    """A folder as torch.distributed.checkpoint writes it, whose index does harm."""
    checkpoint.discard(last)
    last.mkdir()
    (last / ".metadata").write_bytes(pickle.dumps(Harm(last.parent / "harm")))


def foreign(last: Path) -> None:
    """Weights that something else has saved."""
    checkpoint.discard(last)
    torch.save({"weight": torch.ones(3)}, last)


DAMAGES = {"truncate": truncate, "pickled": pickled, "foreign": foreign}


def prepare(run: dict) -> None:
    if "copy" in run:
        source, target = map(Path, run["copy"])
        shutil.copytree(source, target)
        (target / "result.json").unlink()
        DAMAGES[run["damage"]](target / checkpoint.LAST)


# Bytes ----------------------------------------------------------------------------------------


# Which argument holds what leaves, by the name of the operator.
SOURCES = {"allreduce_": 0, "_allgather_base_": 0, "_reduce_scatter_base_": 1, "send": 0}


class Traffic(TorchDispatchMode):
    """Bytes that this process hands to collectives and sends, by the name of the operator.

    Of a gather, the whole that it makes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._opname
        if func.namespace == "c10d" and name in SOURCES:
            tensors = tree_leaves(args[SOURCES[name]])
            self.bytes[name] += sum(x.nbytes for x in tensors if isinstance(x, torch.Tensor))
        return func(*args, **(kwargs or {}))


def counting(run, group) -> None:
    if run.step != 2 or run.config.compile:
        return original["train_step"](run, group)
    with Traffic() as traffic:
        original["train_step"](run, group)
    path = Path(run.config.out) / f"bytes-{parallel.rank()}.json"
    path.write_text(json.dumps(traffic.bytes))


# Runs -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def patched():
    models.create = lambda *args, **options: without_batch_norm(
        original["create"](*args, **options)
    )
    data.load = mostly_ignored
    loop.train_step = counting
    torch.compile = functools.partial(original["compile"], backend="aot_eager")
    yield
    models.create, data.load, loop.finite, loop.train_step, torch.compile = original.values()


def run_all(runs: list[dict]) -> None:
    with patched(), parallel.process_group("cpu"):
        for run in runs:
            loop.finite = stopping_at(run.get("stop"), run.get("kill"))
            parallel.first(lambda run=run: prepare(run))
            with contextlib.ExitStack() as stack:
                if run.get("locked") and parallel.rank() == 0:
                    stack.enter_context(FolderLock(Path(run["locked"])))
                status = main(["train", *run["arguments"]])
            if status != run.get("status", 1 if run.get("stop") else 0):
                sys.exit(f"process {os.environ.get('RANK')}: {run}: ended with {status}")


if __name__ == "__main__":
    run_all(json.loads(Path(sys.argv[1]).read_text()))

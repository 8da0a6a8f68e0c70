# SPDX-License-Identifier: Apache-2.0
"""Two processes make the steps that one makes with the same batches.

Stated tolerance, over 24 steps in float32: losses to 1e-5 of their value, weights to 1e-4 of
their tensor's largest. Sums are rounded in another order, and training amplifies that.
"""

import importlib.util
import json
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from msdkern.train import checkpoint, data
from msdkern.train.batches import TrainBatches
from msdkern.train.config import flag
from msdkern.train.evaluate import evaluate_checkpoint
from msdkern.train.log import read_log

DRIVER = Path(__file__).with_name("parallel_runs.py")
MSD = {"loss": "msd", "alpha": 0.3, "beta_begin": 0.01}
CASES = {
    "mean": {**MSD, "batch_size": 16},
    "normalizer": {**MSD, "batch_size": 8, "accumulate": 2},
    "sum": {
        **MSD,
        "beta_begin": 0.0,
        "beta_end": 0.0,
        "batch_size": 16,
        "lr": 0.005,
        "loss_option": ("reduction=sum",),
    },
    "zero weight": {"loss": "ce", "batch_size": 16, "loss_option": ("exit_weight=[0,1,1]",)},
    "uneven": {**MSD, "batch_size": 15},
}
# What the way of sharing could change is tried in all, the arithmetic around it in one.
PIPELINE = {
    "mean": {},  # 1f1b, four micro-batches of four rows
    "normalizer": {"pipeline_schedule": "gpipe", "micro_batches": 2, "recompute": True},
    "zero weight": {"micro_batches": 2},
    "sum": {"pipeline_schedule": "gpipe", "micro_batches": 1},
}
RUNS = {
    **{(name, "ddp"): {} for name in CASES},
    **{(name, "fsdp"): {} for name in ("mean", "normalizer", "zero weight")},
    **{(name, "pipeline"): changes for name, changes in PIPELINE.items()},
}


def torchrun(*words, environment, processes=2, options=()):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={processes}", *options, *map(str, words)]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def arguments_of(config, *more):
    """The command line of a config."""
    words = []
    for item in fields(config):
        value = getattr(config, item.name)
        if value == item.default:
            continue
        for one in value if isinstance(value, tuple) else (value,):
            words += [flag(item.name)] if one is True else [flag(item.name), str(one)]
    return [*words, *more]


@pytest.fixture(scope="module")
def make(tree, tmp_path_factory):
    from msdkern.train.config import TrainConfig

    folder = tmp_path_factory.mktemp("parallel")

    def config(name, **changes):
        settings = {
            "data": "cifar10", "root": str(tree), "out": str(folder / name), "epochs": 4,
            "lr": 0.02, "threads": 1, "log_every": 1, "quiet": True, "width": 8, "device": "cpu",
        }  # fmt: skip
        return TrainConfig(**{**settings, **changes})

    return config


@pytest.fixture(scope="module")
def finished(make, tmp_path_factory):
    """Every case by one process, by two with whole copies, and by two with shards."""
    import os

    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    single, double = [], []
    for name, changes in CASES.items():
        single.append((make(f"{name} one", **changes), None, ()))
        double += [
            (make(f"{name} {mode}", parallel=mode, **changes, **more), None, ())
            for (case, mode), more in RUNS.items()
            if case == name
        ]
    # Stopped in one mode, continued in the next, finished by one process.
    broken = make("broken", checkpoint_every=1, **CASES["mean"])
    double.append((broken, 5, ()))
    double.append((replace(broken, parallel="fsdp"), 9, ("--resume",)))
    double.append((replace(broken, parallel="pipeline"), 14, ("--resume",)))
    double.append((replace(broken, parallel="fsdp"), 17, ("--resume",)))
    double.append((broken, 20, ("--resume",)))
    single.append((broken, None, ("--resume",)))
    for runs, processes in ((double, 2), (single, 1)):
        path = tmp_path_factory.mktemp("runs") / "runs.json"
        path.write_text(
            json.dumps([{"arguments": arguments_of(c, *m), "stop": stop} for c, stop, m in runs])
        )
        done = torchrun(DRIVER, path, environment=environment, processes=processes)
        assert done.returncode == 0, done.stderr
    return lambda name: Path(make(name).out)


def losses(folder):
    records = [r for r in read_log(folder / "log.jsonl") if r["kind"] == "steps"]
    assert [r["step"] for r in records] == list(range(1, len(records) + 1))
    assert len(records) >= 20
    values = [[r["loss"], *r["accuracy"], *r["cross_entropy"]] for r in records]
    return torch.tensor(values, dtype=torch.float64)


def assert_same(folder, truth):
    torch.testing.assert_close(losses(folder), losses(truth), rtol=1e-5, atol=1e-6)
    got, expected = (checkpoint.load(f / "last.pt") for f in (folder, truth))
    assert got["model"].keys() == expected["model"].keys()
    for name, weight in expected["model"].items():
        bound = 1e-4 * float(weight.abs().max())
        torch.testing.assert_close(got["model"][name], weight, rtol=0, atol=bound)
    assert got["optimizer"]["state"].keys() == expected["optimizer"]["state"].keys()
    left, right = (json.loads((f / "result.json").read_text()) for f in (folder, truth))
    for row, other in zip(left["exits"], right["exits"], strict=True):
        assert row == pytest.approx(other, rel=1e-3)


@pytest.mark.parametrize(("case", "mode"), RUNS)
def test_two_processes_repeat_one(finished, case, mode):
    assert_same(finished(f"{case} {mode}"), finished(f"{case} one"))


def test_stopped_and_continued_by_other_processes(finished):
    assert_same(finished("broken"), finished("mean one"))


def test_killed_process_restarts_the_group(finished, make, environment, tmp_path):
    """torchrun starts both anew, and they go on from the last checkpoint."""
    config = make("killed", checkpoint_every=4, **CASES["mean"])
    path = tmp_path / "runs.json"
    words = arguments_of(config, "--resume")
    path.write_text(json.dumps([{"arguments": words, "stop": None, "kill": 11}]))
    done = torchrun(DRIVER, path, environment=environment, options=["--max-restarts=1"])
    assert done.returncode == 0, done.stderr
    assert "exitcode: -9" in done.stderr
    assert_same(Path(config.out), finished("mean one"))


def test_ignored_rows_are_unevenly_spread(make):
    """What the cases above stand on: halves that differ, some without any valid row."""
    specification = importlib.util.spec_from_file_location("parallel_runs", DRIVER)
    parallel_runs = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(parallel_runs)
    config = make("unused", **CASES["mean"])
    batches = TrainBatches(config, parallel_runs.mostly_ignored(config), torch.device("cpu"))
    halves = [
        [int((half >= 0).sum()) for half in labels.chunk(2)]
        for epoch in range(config.epochs)
        for _, labels in batches.epoch(epoch)
    ]
    assert sum(left != right for left, right in halves) > len(halves) / 2
    assert any(0 in pair for pair in halves)
    data._load.cache_clear()


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_command_line(make, environment, mode):
    """Batch normalisation and all: one log, one table, one checkpoint that one process reads."""
    config = make(f"whole {mode}", parallel=mode, batch_size=16, quiet=False, log_every=3)
    words = ["-m", "msdkern", "train", *arguments_of(config, "--json")]
    done = torchrun(*words, environment=environment)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert done.stdout.count("exit ") <= 1  # one table
    assert done.stderr.count("epoch 4/4") == 1
    kinds = [r["kind"] for r in read_log(Path(config.out) / "log.jsonl")]
    assert kinds == ["steps", "steps", "epoch"] * 4
    again = evaluate_checkpoint(Path(report["checkpoint"]), {})
    for row, other in zip(again["exits"], report["exits"], strict=True):
        assert row == pytest.approx(other, rel=1e-5)
    assert report["exits"][-1]["accuracy"] > 0.5  # chance is 0.25
    # A mistake is one sentence, of one process.
    mistakes = {"ddp": ([], "holds a finished run"), "fsdp": (["--compile"], "--compile: cannot")}
    options, sentence = mistakes[mode]
    folder = ["--out", f"{config.out} again"] if options else []
    done = torchrun(*words, *options, *folder, environment=environment)
    assert done.returncode != 0
    assert done.stderr.count(sentence) == 1

# SPDX-License-Identifier: Apache-2.0
"""Two processes make the steps that one makes with the same batches.

Stated tolerance, over 24 steps in float32: losses to 1e-5 of their value, weights to 1e-5 of
their tensor's largest. Sums are rounded in another order, and training amplifies that. In
bfloat16 two processes are at most twice as far from one as one is from float32.
"""

import importlib.util
import json
import math
import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from msdkern import models
from msdkern.train import checkpoint, data, pipeline
from msdkern.train.batches import TrainBatches
from msdkern.train.config import TrainConfig, flag
from msdkern.train.evaluate import evaluate_checkpoint
from msdkern.train.log import read_log
from msdkern.train.run import ENGINES

DRIVER = Path(__file__).with_name("parallel_runs.py")
README = Path(pipeline.__file__).with_name("README.md")
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
BFLOAT16 = {**CASES["normalizer"], "amp": True}
# What the way of sharing could change is tried in all, the arithmetic around it in one.
PIPELINE = {
    "mean": {},  # 1f1b, four micro-batches of four rows
    "normalizer": {"pipeline_schedule": "gpipe", "micro_batches": 2, "recompute": True},
    "zero weight": {"micro_batches": 2},
    "sum": {"pipeline_schedule": "gpipe", "micro_batches": 8},
}
RUNS = {
    **{(name, "ddp"): {} for name in CASES},
    **{(name, "fsdp"): {} for name in ("mean", "normalizer", "zero weight")},
    **{(name, "pipeline"): changes for name, changes in PIPELINE.items()},
}
# Folders of finished runs whose last checkpoint is damaged, and what is then said of it.
FAULTS = {
    ("ddp", "truncate"): "not a checkpoint, or a damaged one",
    ("ddp", "foreign"): "not a checkpoint of msdkern train",
    ("fsdp", "truncate"): "damaged: the check sum of",
    ("fsdp", "pickled"): "a folder; name one of the checkpoints in it",
}


def torchrun(*words, environment, processes=2, options=()):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={processes}", *options, *map(str, words)]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=600, check=False
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
    folder = tmp_path_factory.mktemp("parallel")

    def config(name, **changes):
        settings = {
            "data": "cifar10", "root": str(tree), "out": str(folder / name), "epochs": 4,
            "lr": 0.02, "threads": 1, "log_every": 1, "quiet": True, "width": 8, "device": "cpu",
        }  # fmt: skip
        return TrainConfig(**{**settings, **changes})

    return config


def shared_runs(make):
    """Every case by two processes, in every mode; then what may go wrong."""

    def run(config, *words, **more):
        return {"arguments": arguments_of(config, *words), **more}

    runs = [
        run(make(f"{case} {mode}", parallel=mode, **CASES[case], **changes))
        for (case, mode), changes in RUNS.items()
    ]
    for mode in ENGINES:
        runs.append(run(make(f"compiled {mode}", parallel=mode, compile=True, **CASES["mean"])))
        runs.append(run(make(f"bfloat16 {mode}", parallel=mode, **BFLOAT16)))
    # Stopped in one mode, continued in the next; one process finishes it.
    broken = make("broken", checkpoint_every=1, **CASES["mean"])
    for mode, stop in (("ddp", 5), ("fsdp", 9), ("pipeline", 14), ("fsdp", 17), ("ddp", 20)):
        words = () if stop == 5 else ("--resume",)
        runs.append(run(replace(broken, parallel=mode), *words, stop=stop))
    for mode, damage in FAULTS:
        source, config = make(f"mean {mode}"), make(f"{damage} {mode}", **CASES["mean"])
        copy = {"copy": [source.out, config.out], "damage": damage}
        runs.append(run(replace(config, parallel=mode), "--resume", **copy))
    runs.append(run(make("locked"), locked=make("locked").out, status=1))
    runs.append(run(make("mean fsdp", **CASES["mean"]), status=1))
    return runs


def lone_runs(make):
    """Their truths, by one process."""
    cases = {**CASES, "bfloat16": BFLOAT16}
    runs = [{"arguments": arguments_of(make(f"{case} one", **cases[case]))} for case in cases]
    broken = make("broken", checkpoint_every=1, **CASES["mean"])
    return [*runs, {"arguments": arguments_of(broken, "--resume")}]


@pytest.fixture(scope="module")
def finished(make, tmp_path_factory):
    """The folder of a run by its name; ``finished.said`` is what both processes said."""
    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}

    def folder(name):
        return Path(make(name).out)

    for processes, runs in ((2, shared_runs(make)), (1, lone_runs(make))):
        path = tmp_path_factory.mktemp("runs") / "runs.json"
        path.write_text(json.dumps(runs))
        done = torchrun(DRIVER, path, environment=environment, processes=processes)
        assert done.returncode == 0, done.stderr
        if processes == 2:
            folder.said = done.stderr
    return folder


def steps_of(folder):
    """Losses and cross entropies, and accuracies, of all steps."""
    records = [r for r in read_log(folder / "log.jsonl") if r["kind"] == "steps"]
    assert [r["step"] for r in records] == list(range(1, len(records) + 1))
    assert len(records) >= 20
    losses = [[r["loss"], *r["cross_entropy"]] for r in records]
    return torch.tensor(losses, dtype=torch.float64), [r["accuracy"] for r in records]


def assert_same(folder, truth):
    (losses, accuracies), (expected, known) = steps_of(folder), steps_of(truth)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)
    assert accuracies == known
    got, expected = (checkpoint.load(f / "last.pt") for f in (folder, truth))
    assert got["model"].keys() == expected["model"].keys()
    for name, value in expected["model"].items():
        bound = 1e-5 * float(value.abs().max())
        torch.testing.assert_close(got["model"][name], value, rtol=0, atol=bound)
    assert got["optimizer"]["state"].keys() == expected["optimizer"]["state"].keys()
    left, right = (json.loads((f / "result.json").read_text()) for f in (folder, truth))
    for row, other in zip(left["exits"], right["exits"], strict=True):
        assert row == pytest.approx(other, rel=1e-3)


def test_every_mode_has_an_engine():
    choices = next(item for item in fields(TrainConfig) if item.name == "parallel").metadata
    assert choices["choices"] == tuple(ENGINES)


@pytest.mark.parametrize(("case", "mode"), RUNS)
def test_two_processes_repeat_one(finished, case, mode):
    assert_same(finished(f"{case} {mode}"), finished(f"{case} one"))


@pytest.mark.parametrize("mode", ENGINES)
def test_compiled_processes_repeat_one(finished, mode):
    assert_same(finished(f"compiled {mode}"), finished("mean one"))


@pytest.mark.parametrize("mode", ENGINES)
def test_bfloat16_is_as_far_as_bfloat16_is(finished, mode):
    def weights(name):
        model = checkpoint.load(finished(name) / "last.pt")["model"]
        return torch.cat([value.double().flatten() for value in model.values()])

    for read in (weights, lambda name: steps_of(finished(name))[0]):
        one, plain = read("bfloat16 one"), read("normalizer one")
        assert (read(f"bfloat16 {mode}") - one).norm() < 2 * (one - plain).norm()


@pytest.mark.parametrize("mode", ENGINES)
def test_an_exit_without_weight_gets_zero_gradients(finished, mode):
    """Not None: its parameters have a momentum, and where nothing decays that is zero."""
    state = checkpoint.load(finished(f"zero weight {mode}") / "last.pt")
    model = models.create("resnet8", 4, width=8)
    momenta, weights = state["optimizer"]["state"], list(model.named_parameters())
    order = [n for n, p in weights if p.ndim > 1] + [n for n, p in weights if p.ndim <= 1]
    assert sorted(momenta) == list(range(len(order)))
    momentum = {name: momenta[k]["momentum_buffer"] for k, name in enumerate(order)}
    assert torch.count_nonzero(momentum["stages.0.exit.classifier.bias"]) == 0
    assert torch.count_nonzero(momentum["stages.1.exit.classifier.bias"]) > 0


def test_stopped_and_continued_by_other_processes(finished):
    assert_same(finished("broken"), finished("mean one"))


@pytest.mark.parametrize(("mode", "damage"), FAULTS)
def test_damaged_checkpoint_gives_way_to_the_previous(finished, mode, damage):
    """One sentence of one process; the epoch that is lost is trained again."""
    folder = finished(f"{damage} {mode}")
    (line,) = (x for x in finished.said.splitlines() if f"{folder}/last.pt" in x)
    assert FAULTS[mode, damage] in line
    assert line.endswith("; taking previous.pt")
    assert_same(folder, finished("mean one"))
    assert not (folder / "harm").exists()


def test_folder_of_another_run_is_refused_once(finished):
    said = finished.said
    assert said.count(f"{finished('locked')}: another run is writing into this folder") == 1
    assert said.count(f"{finished('mean fsdp')}: holds a finished run") == 1


def test_killed_process_restarts_the_group(finished, make, environment, tmp_path):
    """torchrun starts both anew, and they go on from the last checkpoint."""
    config = make("killed", checkpoint_every=4, parallel="pipeline", **CASES["mean"])
    path = tmp_path / "runs.json"
    path.write_text(json.dumps([{"arguments": arguments_of(config, "--resume"), "kill": 11}]))
    done = torchrun(DRIVER, path, environment=environment, options=["--max-restarts=1"])
    assert done.returncode == 0, done.stderr
    assert "exitcode: -9" in done.stderr
    assert_same(Path(config.out), finished("mean one"))


def sizes(model, images, cut):
    """P, the shapes of its weights, F and D of the formulas in msdkern/train/README.md."""
    features, logits, vectors = images, [], []
    for stage in model.stages[:cut]:
        features, logits, vectors = stage(features, logits, vectors)
    shapes = [p.shape for p in model.parameters()]
    return sum(map(math.prod, shapes)), shapes, features[0].numel(), vectors[0].shape[1]


@pytest.mark.parametrize("mode", ENGINES)
@pytest.mark.parametrize("case", ["mean", "normalizer", "bfloat16"])
def test_bytes_are_those_of_the_formulas(finished, case, mode):
    config = {**CASES, "bfloat16": BFLOAT16}[case]
    rows, batches = config["batch_size"], config.get("accumulate", 1)
    cut, classes, width = 1, 4, 2 if config.get("amp") else 4
    model = models.create("resnet8", classes, width=8)
    count, shapes, features, vector = sizes(model, torch.zeros(1, 3, 8, 8), cut)
    padded = sum(2 * -(-shape[0] // 2) * math.prod(shape[1:]) for shape in shapes)
    edge = batches * rows * width * (features + cut * (classes + vector))
    expected = {
        "ddp": {"allreduce_": 4 * count + 8},
        "fsdp": {
            "allreduce_": 8,
            "_allgather_base_": 2 * batches * 4 * padded,
            "_reduce_scatter_base_": 4 * padded,
        },
        "pipeline": {"send": edge},
    }[mode]
    for rank in range(2):
        path = finished(f"{case} {mode}") / f"bytes-{rank}.json"
        assert json.loads(path.read_text()) == expected
    if case == "mean":
        assert f"| `{mode}` | {sum(expected.values()):,} |" in README.read_text()


def test_table_of_the_sizing_page():
    """Every row is what the formulas make of the network, its cut found as in training."""
    lines = [line.split(" | ") for line in README.read_text().splitlines()]
    rows = [line for line in lines if line[0][2:].split(", ")[0] in models.names()]
    assert len(rows) == 5
    for first, *rest in rows:
        name, classes = first[2:].split(", ")
        shape = (3, 224, 224) if classes == "1000" else (3, 32, 32)
        with torch.device("meta"):
            model = models.create(name, int(classes))
        count, cost = sum(p.numel() for p in model.parameters()), models.multiply_adds(model, shape)
        starts = pipeline.even_cuts(cost, 2)
        load = pipeline.loads(model, starts, False, TrainConfig(), torch.device("cpu"), shape)[1]
        sizes = [math.prod(size) for _, size in load.kinds]
        features, logits = sum(sizes[: load.features]), sum(sizes[load.features :])
        pays = [math.ceil(8 * count * ratio / (3 * cost[-1])) for ratio in (20, 750)]
        numbers = [count, features, logits, count // (2 * (features + logits)), *pays]
        told = [int(cell.split(" row")[0].replace(",", "")) for cell in rest]
        assert told == numbers


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


@pytest.mark.parametrize("mode", ENGINES)
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

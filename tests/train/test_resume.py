# SPDX-License-Identifier: Apache-2.0
"""Runs that are killed, and continue to the bits of a run that was not."""

import json
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from msdkern.cli import CommandError
from msdkern.train import checkpoint, fit
from msdkern.train.config import flag, resume_config
from msdkern.train.log import read_log

DRIVER = Path(__file__).with_name("killed_run.py")
CLOCKS = ("seconds", "rows_per_second")


def arguments_of(config):
    """The command line of a config."""
    words = []
    for item in fields(config):
        value = getattr(config, item.name)
        if value == item.default:
            continue
        words += [flag(item.name)] if value is True else [flag(item.name), str(value)]
    return words


def weights(folder):
    state = checkpoint.load(Path(folder) / "last.pt")
    momenta = state["optimizer"]["state"]
    tensors = {f"momentum {k}": v["momentum_buffer"] for k, v in momenta.items()}
    return {**state["model"], **tensors}


def lines(folder):
    """The log without its clocks."""
    records = read_log(Path(folder) / "log.jsonl")
    return [{k: v for k, v in record.items() if k not in CLOCKS} for record in records]


def assert_same_run(one, other):
    left, right = weights(one), weights(other)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert lines(one) == lines(other)
    results = [json.loads((Path(f) / "result.json").read_text()) for f in (one, other)]
    assert results[0]["exits"] == results[1]["exits"]


@pytest.mark.parametrize("seed", [0, 1])
def test_killed_runs_reach_the_same_bits(config, tmp_path, environment, seed):
    whole = config(out=str(tmp_path / "whole"), checkpoint_every=1, accumulate=1 + seed)
    fit(whole)
    broken = replace(whole, out=str(tmp_path / "broken"))
    command = [sys.executable, str(DRIVER), str(seed), "12", *arguments_of(broken), "--resume"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) >= 4  # otherwise nothing was tested
    assert_same_run(whole.out, broken.out)


@pytest.mark.parametrize("last", ["previous.pt", None], ids=["before", "between"])
def test_killed_at_the_renames_of_the_last_checkpoint(config, last):
    """Nothing is left to train, so nothing else would put the last checkpoint in its place."""
    whole = config(out=config().out + "-whole")
    fit(whole)
    broken = replace(whole, out=whole.out + "-broken")
    fit(broken)
    folder = Path(broken.out)
    (folder / "result.json").unlink()
    (folder / "last.pt").rename(folder / "next.pt")
    if last:
        (folder / last).rename(folder / "last.pt")
    fit(broken, resume=True)
    assert_same_run(whole.out, broken.out)
    assert not (folder / "next.pt").exists()


def test_stopped_in_the_middle_of_an_epoch(config, tmp_path):
    whole = config(out=str(tmp_path / "whole"), checkpoint_every=1, log_every=4)
    fit(whole)
    broken = replace(whole, out=str(tmp_path / "broken"))

    class Stop(Exception):
        pass

    def stop(record, step):
        if step >= 8:
            raise Stop

    with pytest.raises(Stop):
        fit(broken, log=stop)
    state = checkpoint.load(Path(broken.out) / "last.pt")
    assert (state["step"], state["batch"]) == (7, 1)  # six steps per epoch
    fit(broken, resume=True)
    assert_same_run(whole.out, broken.out)


def test_damaged_checkpoint_gives_way_to_the_previous(config, tmp_path, capsys):
    whole = config(out=str(tmp_path / "whole"))
    fit(whole)
    broken = replace(whole, out=str(tmp_path / "broken"), quiet=False)
    fit(broken)
    (tmp_path / "broken" / "result.json").unlink()
    last = tmp_path / "broken" / "last.pt"
    last.write_bytes(last.read_bytes()[:-1000])
    capsys.readouterr()
    fit(broken, resume=True)
    message = capsys.readouterr().err.splitlines()[0]
    assert "last.pt" in message
    assert "previous.pt" in message
    assert_same_run(whole.out, broken.out)


def test_all_checkpoints_damaged(config):
    c = config(epochs=1)
    fit(c)
    (Path(c.out) / "result.json").unlink()
    (Path(c.out) / "last.pt").write_bytes(b"no checkpoint")
    with pytest.raises(CommandError, match=r"last\.pt: not a checkpoint"):
        fit(c, resume=True)


def test_other_images_are_refused(config, tmp_path, tree):
    import shutil

    c = config(epochs=1)
    fit(c)
    (Path(c.out) / "result.json").unlink()
    other = shutil.copytree(tree, tmp_path / "other")
    (other / "train" / "ant" / "0000.png").unlink()
    with pytest.raises(CommandError, match="--resume: the images of --data cifar10 are not those"):
        fit(replace(c, root=str(other)), resume=True)


def test_other_config_is_refused_by_name(config):
    c = config()
    with pytest.raises(CommandError, match=r"--lr is 0\.02 in the run that is there; got 0\.5"):
        resume_config(c, {"lr": 0.5})
    with pytest.raises(CommandError, match="--validation is 0 in the run that is there; got 9"):
        resume_config(c, {"validation": 9})
    assert resume_config(c, {"checkpoint_every": 7, "lr": 0.02}) == replace(c, checkpoint_every=7)


def test_finished_run_is_neither_overwritten_nor_repeated(config):
    c = config(epochs=1)
    report = fit(c)
    before = (Path(c.out) / "last.pt").read_bytes()
    with pytest.raises(CommandError, match="holds a finished run"):
        fit(c)
    assert fit(c, resume=True) == report
    assert (Path(c.out) / "last.pt").read_bytes() == before


def test_unfinished_run_asks_for_resume(config):
    c = config(epochs=1)
    fit(c)
    (Path(c.out) / "result.json").unlink()
    with pytest.raises(CommandError, match="has not finished; continue it with --resume"):
        fit(c)


def test_two_runs_in_one_folder(config, tmp_path):
    from msdkern.train.files import FolderLock

    c = config(epochs=1)
    with (
        FolderLock(Path(c.out)),
        pytest.raises(CommandError, match=r"another run is writing into this folder \(process \d+"),
    ):
        fit(c)
    fit(c)


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_full_disk_loses_no_checkpoint(config, monkeypatch, name):
    """The disk fills up at the first, second, ... step of writing the second checkpoint."""
    import errno
    import os

    c = config(checkpoint_every=1)
    original = getattr(os, name)
    calls = []

    def full(*args):
        calls.append(args)
        if len(calls) >= 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, name, full)
        with pytest.raises(CommandError, match="No space left on device; what was saved"):
            fit(c)
    state = checkpoint.load_newest(Path(c.out), print)
    assert state["step"] >= 1
    assert not list(Path(c.out).glob("*.tmp"))
    whole = replace(c, out=c.out + "-whole")
    fit(whole)
    fit(c, resume=True)
    assert_same_run(c.out, whole.out)

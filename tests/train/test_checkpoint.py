# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: whole or absent, harmless, and told apart from other files."""

import errno
import io
import os
import pickle
import random
import zipfile

import numpy as np
import pytest
import torch

from msdkern.cli import CommandError
from msdkern.train import checkpoint
from msdkern.train.files import write_atomically


def state(step):
    values = dict.fromkeys(checkpoint.KEYS, 0)
    return {**values, "step": step, "model": {"weight": torch.arange(3000.0) + step}}


def newest(folder):
    warnings = []
    found = checkpoint.load_newest(folder, warnings.append)
    return (None if found is None else found["step"]), warnings


def test_last_and_previous(tmp_path):
    assert newest(tmp_path) == (None, [])
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, state(step))
    assert checkpoint.load(tmp_path / "last.pt")["step"] == 3
    assert checkpoint.load(tmp_path / "previous.pt")["step"] == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.pt", "previous.pt"]
    assert torch.equal(
        checkpoint.load(tmp_path / "last.pt")["model"]["weight"], torch.arange(3000.0) + 3
    )


def test_interrupted_between_any_two_renames(tmp_path, monkeypatch):
    """Whatever the step at which a process ends, the newest whole checkpoint is found."""

    class Killed(BaseException):
        pass

    original = os.replace
    found = []
    for survived in range(4):
        folder = tmp_path / str(survived)
        folder.mkdir()
        checkpoint.save(folder, state(1))
        checkpoint.save(folder, state(2))
        calls = []

        def replace(*args, calls=calls, survived=survived):
            calls.append(args)
            if len(calls) > survived:
                raise Killed
            original(*args)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace)
            try:
                checkpoint.save(folder, state(3))
            except Killed:
                assert survived < 3
        found.append(newest(folder))
        checkpoint.save(folder, state(4))
        assert newest(folder) == (4, [])
    assert found == [(2, []), (3, []), (3, []), (3, [])]


def test_truncated_at_any_length_is_refused_and_replaced(tmp_path):
    checkpoint.save(tmp_path, state(1))
    checkpoint.save(tmp_path, state(2))
    data = (tmp_path / "last.pt").read_bytes()
    for length in [0, 1, 100, len(data) // 2, len(data) - 1]:
        (tmp_path / "last.pt").write_bytes(data[:length])
        step, warnings = newest(tmp_path)
        assert step == 1
        assert len(warnings) == 1
        assert "\n" not in warnings[0]
        assert warnings[0].endswith("taking previous.pt")


def test_one_changed_bit_is_noticed(tmp_path):
    checkpoint.save(tmp_path, state(1))
    path = tmp_path / "last.pt"
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda item: item.file_size)
    data[largest.header_offset + 2000] ^= 4  # inside the weights
    path.write_bytes(data)
    torch.load(path, weights_only=True)  # PyTorch alone does not notice
    with pytest.raises(CommandError, match=r"last\.pt: damaged: the check sum of"):
        checkpoint.load(path)


class Harm:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (os.mkdir, (str(self.target),))


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    target = tmp_path / "harm"
    torch.save({"format": checkpoint.FORMAT, **state(1), "config": Harm(target)}, tmp_path / "x.pt")
    with pytest.raises(CommandError, match=r"x\.pt: not a checkpoint, or a damaged one"):
        checkpoint.load(tmp_path / "x.pt")
    assert not target.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a checkpoint, or a damaged one"),
        (b"hello", "not a checkpoint, or a damaged one"),
        (pickle.dumps({"a": 1}), "not a checkpoint, or a damaged one"),
        ({"weight": torch.ones(2)}, "not a checkpoint of msdkern train"),
        (torch.ones(2), "not a checkpoint of msdkern train"),
        ({"format": checkpoint.FORMAT, "step": 1}, "lacks batch, classes, config"),
    ],
)
def test_foreign_files(tmp_path, content, message):
    path = tmp_path / "x.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(CommandError) as error:
        checkpoint.load(path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_names_that_are_no_files(tmp_path):
    with pytest.raises(CommandError, match="there is no such file"):
        checkpoint.load(tmp_path / "none.pt")
    with pytest.raises(CommandError, match="a folder; name one of the checkpoints in it"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_full_disk_changes_nothing(tmp_path, monkeypatch, step):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    if step != "write":
        monkeypatch.setattr(os, step, full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, full if step == "write" else lambda file: file.write(b"new"))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_generators_continue_where_they_were():
    def draw():
        return torch.rand(3).tolist(), random.random(), np.random.rand(3).tolist()  # noqa: NPY002

    draw()
    buffer = io.BytesIO()
    torch.save(checkpoint.random_state(), buffer)
    expected = draw()
    draw()
    buffer.seek(0)
    checkpoint.set_random_state(torch.load(buffer, weights_only=True))
    assert draw() == expected

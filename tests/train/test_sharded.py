# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in folders: whole or absent, harmless to read, and readable piece by piece."""

import contextlib
import json
import os
import pickle
import zlib

import pytest
import torch

from msdkern.cli import CommandError
from msdkern.train import checkpoint, sharded


def state(step):
    values = dict.fromkeys(checkpoint.KEYS, 0)
    model = {"a.weight": torch.arange(3000.0).view(30, 100) + step, "count": torch.tensor(step)}
    momentum = {0: {"momentum_buffer": torch.ones(30, 100) * step}}
    optimizer = {"state": momentum, "param_groups": [{"lr": 0.1, "params": [0]}]}
    return {**values, "step": step, "model": model, "optimizer": optimizer}


def newest(folder):
    warnings = []
    found = checkpoint.load_newest(folder, warnings.append)
    return (None if found is None else found["step"]), warnings


def edit(folder, change):
    """Changes the index of a checkpoint."""
    path = folder / sharded.INDEX
    index = json.loads(path.read_text())
    change(index)
    index["crc32"] = sharded._crc(index.get("tensors"))
    path.write_text(json.dumps(index))


def test_what_is_read_is_what_was_written(tmp_path):
    for step in (1, 2, 3):
        checkpoint.save_sharded(tmp_path, state(step))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.pt", "previous.pt"]
    got, expected = checkpoint.load(tmp_path / "last.pt"), state(3)
    assert got.keys() == expected.keys() | {"format"}
    for name, value in expected["model"].items():
        torch.testing.assert_close(got["model"][name], value, rtol=0, atol=0)
    momentum = got["optimizer"]["state"][0]["momentum_buffer"]
    torch.testing.assert_close(momentum, torch.ones(30, 100) * 3, rtol=0, atol=0)
    assert got["optimizer"]["param_groups"] == expected["optimizer"]["param_groups"]
    assert checkpoint.load(tmp_path / "previous.pt")["step"] == 2
    assert not list(tmp_path.rglob(".metadata"))


def test_one_tensor_is_read_without_the_others(tmp_path):
    checkpoint.save_sharded(tmp_path, state(5))
    target = torch.zeros(30, 100)
    sharded.read(tmp_path / "last.pt", {"model.a.weight": target})
    assert torch.equal(target, state(5)["model"]["a.weight"])
    with pytest.raises(CommandError, match=r"last\.pt: does not fit this run"):
        sharded.read(tmp_path / "last.pt", {"model.b": target})
    with pytest.raises(CommandError, match=r"last\.pt: does not fit this run"):
        sharded.read(tmp_path / "last.pt", {"model.a.weight": torch.zeros(3)})


def test_files_and_folders_take_turns(tmp_path):
    """A run may go on in another mode behind every checkpoint."""
    savers = [checkpoint.save, checkpoint.save_sharded]
    for step, save in enumerate([savers[int(bit)] for bit in "0011010"], 1):
        save(tmp_path, state(step))
        assert newest(tmp_path) == (step, [])
        assert step == 1 or checkpoint.load(tmp_path / "previous.pt")["step"] == step - 1


def test_interrupted_between_any_two_steps(tmp_path, monkeypatch):
    """Whatever the rename or sync at which a process ends, a whole checkpoint is found."""

    class Killed(BaseException):
        pass

    discard = checkpoint.discard
    for name in ("replace", "fsync", "mkdir"):
        original, found = getattr(os, name), []
        for survived in range(10):
            folder = tmp_path / f"{name}{survived}"
            folder.mkdir()
            checkpoint.save_sharded(folder, state(1))
            checkpoint.save_sharded(folder, state(2))
            calls = []

            def killing(*args, calls=calls, survived=survived, original=original):
                calls.append(args)
                if len(calls) > survived:
                    raise Killed
                return original(*args)

            def tidy(path, calls=calls, survived=survived):
                if len(calls) > survived:  # the dead do not tidy up
                    raise Killed
                discard(path)

            with monkeypatch.context() as patch:
                patch.setattr(os, name, killing)
                patch.setattr(checkpoint, "discard", tidy)
                with contextlib.suppress(Killed, CommandError):
                    checkpoint.save_sharded(folder, state(3))
            found.append(newest(folder))
            checkpoint.save_sharded(folder, state(4))
            assert newest(folder) == (4, [])
        assert found[0] == (2, [])
        assert found[-1] == (3, [])
        assert found == sorted(found)


class Harm:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (os.mkdir, (str(self.target),))


def test_pickles_in_a_folder_are_not_read(tmp_path):
    """Neither PyTorch's own index, nor one in the place of a part or of the rest."""
    checkpoint.save_sharded(tmp_path, state(1))
    last, target = tmp_path / "last.pt", tmp_path / "harm"
    (last / ".metadata").write_bytes(pickle.dumps(Harm(target)))
    assert checkpoint.load(last)["step"] == 1
    part = next(last.glob("*.distcp"))
    for name in (part.name, sharded.REST):
        torch.save(Harm(target), last / name)
        content = (last / name).read_bytes()

        def listed(index, name=name, content=content):
            index["files"][name] = {"bytes": len(content), "crc32": zlib.crc32(content)}
            for entry in index["tensors"].values():
                for piece in entry["pieces"]:
                    piece |= {"begin": 0, "length": len(content)}

        edit(last, listed)
        with pytest.raises(CommandError):
            checkpoint.load(last)
        assert not target.exists()
        checkpoint.save_sharded(tmp_path, state(1))


def test_every_file_is_checked(tmp_path):
    checkpoint.save_sharded(tmp_path, state(1))
    checkpoint.save_sharded(tmp_path, state(2))
    last = tmp_path / "last.pt"
    for path in sorted(last.iterdir()):
        content = path.read_bytes()
        spoilt = bytearray(content)
        spoilt[len(spoilt) // 2] ^= 4
        for bad in (bytes(spoilt), content[:-1], b""):
            path.write_bytes(bad)
            step, warnings = newest(tmp_path)
            assert step in (1, 2 if path.name == sharded.INDEX else 1)
            assert all(warning.endswith("; taking previous.pt") for warning in warnings)
            assert all("\n" not in warning for warning in warnings)
            assert step == 2 or len(warnings) == 1
        path.unlink()
        assert newest(tmp_path)[0] == 1
        path.write_bytes(content)
    assert newest(tmp_path) == (2, [])


def enlarge(index):
    """A tensor that would take all memory."""
    entry = index["tensors"]["model.count"]
    entry["size"] = entry["pieces"][0]["size"] = [1 << 50]
    entry["pieces"][0]["offset"] = [0]


def pieces(index):
    return index["tensors"]["model.a.weight"]["pieces"]


def halves(index):
    """The first half, twice."""
    entry = index["tensors"]["model.a.weight"]
    entry["size"], entry["pieces"] = [60, 100], entry["pieces"] * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: i.update(format="other"), "its format is 'other'"),
        (lambda i: i["files"].update({"../x": {}}), "it names files outside the folder"),
        (lambda i: i["tensors"]["model.count"].update(dtype="save"), "'save' is not a dtype"),
        (lambda i: i["tensors"]["model.count"].update(size=[2]), "do not make up [2]"),
        (lambda i: i["tensors"]["model.count"]["pieces"][0].update(file="/etc/x"), "not listed"),
        (lambda i: i.pop("tensors"), "'tensors'"),
        (lambda i: i["files"].pop(sharded.REST), "it does not list rest.pt"),
        (lambda i: i["files"].update({"..": {}}), "it names files outside the folder"),
        (lambda i: pieces(i)[0].update(offset=[0]), "model.a.weight has other dimensions"),
        (lambda i: i["tensors"]["model.count"].update(size=[-1, -1]), "has the size [-1, -1]"),
        (lambda i: pieces(i)[0].update(offset=[1, 0]), "a piece of model.a.weight lies outside it"),
        (halves, "pieces of model.a.weight overlap"),
        (enlarge, "a piece of model.count is larger than its file"),
    ],
)
def test_index_of_somebody_else(tmp_path, change, message):
    checkpoint.save_sharded(tmp_path, state(1))
    edit(tmp_path / "last.pt", change)
    with pytest.raises(CommandError) as error:
        checkpoint.load(tmp_path / "last.pt")
    assert message in str(error.value)
    assert "not a checkpoint, or a damaged one" in str(error.value)


def test_what_cannot_be_written_changes_nothing(tmp_path, monkeypatch):
    checkpoint.save_sharded(tmp_path, state(1))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CommandError, match=r"cannot be written: .*No space left on device"):
        checkpoint.save_sharded(tmp_path, state(2))
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]
    assert newest(tmp_path) == (1, [])


def test_numbers_of_the_index_are_checked_by_their_sum(tmp_path):
    checkpoint.save_sharded(tmp_path, state(1))
    path = tmp_path / "last.pt" / sharded.INDEX
    index = json.loads(path.read_text())
    pieces(index)[0]["begin"] = 1
    path.write_text(json.dumps(index))
    with pytest.raises(CommandError, match="its check sum does not match"):
        checkpoint.load(tmp_path / "last.pt")


@pytest.mark.parametrize("save", [checkpoint.save, checkpoint.save_sharded])
def test_what_a_kill_left_is_kept_while_the_next_is_written(tmp_path, save, monkeypatch):
    """Killed before its rename, the first checkpoint is all there is."""
    checkpoint.save_sharded(tmp_path, state(1))
    (tmp_path / "last.pt").rename(tmp_path / checkpoint.NEXT)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_atomically", full)
    monkeypatch.setattr(checkpoint, "sync_folder", lambda folder: None)
    real = checkpoint.os.replace
    monkeypatch.setattr(
        checkpoint.os, "replace", lambda a, b: full() if "parts" in str(a) else real(a, b)
    )
    with pytest.raises((OSError, CommandError)):
        save(tmp_path, state(2))
    monkeypatch.undo()
    assert newest(tmp_path)[0] == 1

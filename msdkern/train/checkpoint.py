# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that are whole, harmless to read, and enough to continue to the same bits."""

from __future__ import annotations

import io
import os
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from msdkern.cli import CommandError
from msdkern.train import parallel
from msdkern.train.files import sync_folder, write_atomically

FORMAT = "msdkern checkpoint 1"
NEXT, LAST, PREVIOUS = "next.pt", "last.pt", "previous.pt"
PARTS, RUBBISH = "next.pt.parts", "rubbish.tmp"  # a folder that grows, and one that goes
SHARDS = "shards"
# Every key that a run needs to continue; `Run.state` writes them.
KEYS = frozenset(
    ("config", "model", "criterion", "optimizer", "epoch", "batch", "step", "meters", "seconds",
     "log_size", "random", "fingerprint", "classes", "input_shape")
)  # fmt: skip


def save(folder: Path, state: dict[str, Any]) -> None:
    """``state`` becomes ``last.pt`` and the one before it ``previous.pt``.

    Killed at any moment, the folder holds at least one whole checkpoint if it held one before.
    Raises ``OSError`` when the disk is full, and then nothing has changed.
    """
    discard(folder / PARTS)
    if (folder / NEXT).is_dir():
        rotate(folder)  # a kill left it: it may be all there is
    content = encoded(state)
    write_atomically(folder / NEXT, lambda file: file.write(content))
    rotate(folder)


def save_sharded(folder: Path, state: dict[str, Any]) -> None:
    """The same by all processes together, each its part: then ``last.pt`` is a folder.

    Raises ``CommandError`` in all of them when it cannot be written.
    """
    from msdkern.train import sharded

    parts, (rest, tensors) = folder / PARTS, split(state)
    parallel.first(lambda: discard(parts))
    try:
        sharded.write(parts, tensors, encoded(rest))
    except BaseException:
        if parallel.rank() == 0:
            discard(parts)
        raise

    def publish() -> None:
        if (folder / NEXT).exists():
            rotate(folder)  # a kill left it: it may be all there is
        os.replace(parts, folder / NEXT)
        rotate(folder)

    parallel.first(publish)


def encoded(state: dict[str, Any]) -> bytes:
    """What a file holds. PyTorch's own writer reports a full disk as RuntimeError."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    return buffer.getvalue()


def rotate(folder: Path) -> None:
    """``next.pt`` becomes ``last.pt``, and that ``previous.pt``."""
    fresh, last, previous = folder / NEXT, folder / LAST, folder / PREVIOUS
    # A kill before or between these renames leaves `next.pt`, which `load_newest` puts in place.
    if last.exists():
        if last.is_dir() or previous.is_dir():
            discard(previous)  # nothing takes the place of a folder, or a folder that of a file
        os.replace(last, previous)
    os.replace(fresh, last)
    sync_folder(folder)


def discard(path: Path) -> None:
    """Removes a file or a folder, if there is one."""
    if path.is_dir():
        # At once under its name, so that nobody reads half of it.
        rubbish = path.with_name(RUBBISH)
        shutil.rmtree(rubbish, ignore_errors=True)
        os.replace(path, rubbish)
        shutil.rmtree(rubbish)
    else:
        path.unlink(missing_ok=True)


def split(state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """``state`` without the tensors of the network and the optimiser, and these by name."""
    optimizer = state["optimizer"]
    tensors = {f"model.{name}": value for name, value in state["model"].items()}
    for number, values in optimizer["state"].items():
        tensors |= {f"optimizer.{number}.{name}": value for name, value in values.items()}
    rest = {**state, "model": {}, "optimizer": {**optimizer, "state": {}}}
    return rest, {name: value for name, value in tensors.items() if not value.is_meta}


def join(rest: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Undoes `split`."""
    model: dict[str, Tensor] = {}
    optimizer: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        kind, name = name.split(".", 1)
        if kind == "model":
            model[name] = value
        else:
            number, name = name.split(".", 1)
            optimizer.setdefault(int(number), {})[name] = value
    return {**rest, "model": model, "optimizer": {**rest["optimizer"], "state": optimizer}}


def load(path: Path) -> dict[str, Any]:
    """The state in ``path``, on the CPU. Runs no code from the file, or from the folder.

    Raises ``CommandError`` if it is missing, damaged, or no checkpoint of this package.
    """
    from msdkern.train import sharded

    state = load_rest(path)
    if SHARDS not in state:
        return state
    folder = Path(state.pop(SHARDS))
    return join(state, sharded.read_whole(folder, sharded.read_index(folder)))


def load_rest(path: Path) -> dict[str, Any]:
    """`load`, but the tensors of a folder are left there: ``SHARDS`` says where and which.

    So every process may read its own.
    """
    if not path.is_dir():
        return load_file(path)
    from msdkern.train import sharded

    if not sharded.is_sharded(path):
        raise CommandError(f"{path}: a folder; name one of the checkpoints in it")
    sharded.verify(path)
    return {**load_file(path / sharded.REST), SHARDS: str(path)}


def load_file(path: Path) -> dict[str, Any]:
    """The state in a file."""
    try:
        with zipfile.ZipFile(path) as archive:  # PyTorch itself does not compare the check sums
            broken = archive.testzip()
        if broken is not None:
            raise CommandError(f"{path}: damaged: the check sum of {broken} does not match")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CommandError(f"{path}: there is no such file") from None
    except PermissionError:
        raise CommandError(f"{path}: permission denied") from None
    except CommandError:
        raise
    except Exception as error:  # what torch.load raises on a damaged file is not specified
        reason = str(error).strip().split("\n")[0]
        raise CommandError(f"{path}: not a checkpoint, or a damaged one: {reason}") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CommandError(f"{path}: not a checkpoint of msdkern train")
    if KEYS - state.keys():
        raise CommandError(f"{path}: lacks {', '.join(sorted(KEYS - state.keys()))}")
    return state


def load_newest(folder: Path, warn: Callable[[str], None]) -> dict[str, Any] | None:
    """The newest whole checkpoint of a run as `load_rest` reads it, None if it wrote none yet.

    A damaged one is reported through ``warn`` and the one before it is taken; when all are
    damaged, the last report is raised. What a kill left as ``next.pt`` becomes ``last.pt``: a run
    that has no step left writes no other.
    """
    present = [folder / name for name in (NEXT, LAST, PREVIOUS) if (folder / name).exists()]
    for position, path in enumerate(present):
        try:
            state = load_rest(path)
        except CommandError as error:
            if position == len(present) - 1:
                raise
            warn(f"{error}; taking {present[position + 1].name}")
            continue
        if path.name != NEXT:
            return state
        rotate(folder)
        return load_rest(folder / LAST)  # a folder says where its tensors are
    return None


def random_state() -> dict[str, Any]:
    """The generators that a model or a loss may draw from."""
    version, words, gauss = random.getstate()
    name, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002
    gpu = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {
        "torch": torch.get_rng_state(),
        "cuda": gpu,
        "python": (version, words, gauss),
        "numpy": (name, torch.from_numpy(np.asarray(keys, np.int64)), *rest),
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Undoes ``random_state``."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002

# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that are whole, harmless to read, and enough to continue to the same bits."""

from __future__ import annotations

import io
import os
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from msdkern.cli import CommandError
from msdkern.train.files import sync_folder, write_atomically

FORMAT = "msdkern checkpoint 1"
NEXT, LAST, PREVIOUS = "next.pt", "last.pt", "previous.pt"
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
    # PyTorch's own writer reports a full disk as RuntimeError; ours must be an OSError.
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    fresh, last = folder / NEXT, folder / LAST
    write_atomically(fresh, lambda file: file.write(buffer.getbuffer()))
    # A kill between these renames leaves `next.pt`, which `load_newest` knows.
    if last.exists():
        os.replace(last, folder / PREVIOUS)
    os.replace(fresh, last)
    sync_folder(folder)


def load(path: Path) -> dict[str, Any]:
    """The state in ``path``, on the CPU. Runs no code from the file.

    Raises ``CommandError`` if the file is missing, damaged, or no checkpoint of this package.
    """
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
    except IsADirectoryError:
        raise CommandError(f"{path}: a folder; name one of the checkpoints in it") from None
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
    """The newest whole checkpoint of a run, or None if it wrote none yet.

    A damaged one is reported through ``warn`` and the one before it is taken; when all are
    damaged, the last report is raised.
    """
    present = [folder / name for name in (NEXT, LAST, PREVIOUS) if (folder / name).exists()]
    for position, path in enumerate(present):
        try:
            return load(path)
        except CommandError as error:
            if position == len(present) - 1:
                raise
            warn(f"{error}; taking {present[position + 1].name}")
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

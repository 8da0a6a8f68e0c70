# SPDX-License-Identifier: Apache-2.0
"""Files that are whole or absent, and folders that one process at a time may write."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from msdkern.cli import CommandError


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Gives a failed write the name of its file, which the system leaves out."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None


def write_atomically(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """``write(file)`` into a temporary neighbour that then takes the place of ``path``.

    A reader sees the old file or the new one, also after a power failure. When the disk is full
    the neighbour is removed, the old file stays, and the ``OSError`` is passed on.
    """
    neighbour = path.with_name(path.name + ".tmp")
    try:
        with naming(path), open(neighbour, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(neighbour, path)
    except BaseException:
        neighbour.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes renames in ``folder`` durable; systems that cannot open folders need no such thing."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class FolderLock:
    """Held while a run writes its folder; the system drops it when the process ends, however."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "lock"
        self.file: IO[str] | None = None

    def __enter__(self) -> FolderLock:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(self.path, "a+", encoding="utf-8")
        try:
            _lock(self.file)
        except OSError:
            self.file.seek(0)
            owner = self.file.read().strip() or "unknown"
            self.file.close()
            raise CommandError(
                f"{self.path.parent}: another run is writing into this folder (process {owner})"
            ) from None
        self.file.truncate(0)
        self.file.write(f"{os.getpid()}\n")
        self.file.flush()
        return self

    def __exit__(self, *_: object) -> None:
        # The file stays: removing it would let two processes lock two files of one name.
        if self.file is not None:
            self.file.close()


def _lock(file: IO[str]) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    else:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

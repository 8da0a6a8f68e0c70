# SPDX-License-Identifier: Apache-2.0
"""What a run tells: one JSON object per line in a file, and one line on the terminal."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msdkern.train import parallel
from msdkern.train.files import naming


class Log:
    """``log.jsonl``, cut back to what the checkpoint knew and continued from there.

    The run repeats the steps after its checkpoint, and so their lines: cutting first is what
    keeps any line from being lost or written twice.
    """

    def __init__(self, path: Path, size: int = 0) -> None:
        # Only process 0 has something to write.
        self.path = path if parallel.rank() == 0 else Path(os.devnull)
        self.file = open(self.path, "ab")  # noqa: SIM115 - closed by the run
        if self.file.tell() > size:
            self.file.truncate(size)
        self.file.seek(0, os.SEEK_END)

    def write(self, record: dict[str, Any]) -> None:
        with naming(self.path):
            self.file.write(json.dumps(record).encode() + b"\n")
            self.file.flush()

    def sync(self) -> int:
        """Makes all lines durable and returns the file's size, for the checkpoint."""
        if parallel.rank() == 0:
            with naming(self.path):
                os.fsync(self.file.fileno())
        return self.file.tell()

    def close(self) -> None:
        # What a full disk did not take stays in the buffer, and closing would try it again.
        with contextlib.suppress(OSError):
            self.file.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a ``log.jsonl``; a last line cut short by a kill is left out."""
    lines = path.read_bytes().split(b"\n")[:-1]
    return [json.loads(line) for line in lines if line]


class Meter:
    """Sums over the rows of this process that stay on the device until somebody reads them."""

    def __init__(self, exits: int, device: torch.device) -> None:
        kind = torch.float32 if device.type == "mps" else torch.float64
        self.sums = torch.zeros(2 + 2 * exits, dtype=kind, device=device)
        self.exits = exits

    def add(self, loss: Tensor, correct: Tensor, cross_entropy: Tensor, rows: float) -> None:
        """A batch's mean loss, right answers ``[K]`` and mean cross entropies ``[K]``."""
        mean = torch.cat([loss.reshape(1), cross_entropy]).to(self.sums.dtype) * rows
        self.sums += torch.cat([mean.new_full((1,), rows), mean[:1], correct.to(mean), mean[1:]])

    def read(self) -> dict[str, Any]:
        """The means so far, over all processes. On a GPU this waits for the device."""
        rows, loss, *rest = parallel.sum_over(self.sums).tolist()
        rows = max(rows, 1.0)
        return {
            "loss": loss / rows,
            "accuracy": [value / rows for value in rest[: self.exits]],
            "cross_entropy": [value / rows for value in rest[self.exits :]],
        }

    def clear(self) -> None:
        self.sums.zero_()


class Progress:
    """A line that rewrites itself on a terminal; elsewhere one line per epoch."""

    def __init__(self, total: int, done: int, batch_rows: int, quiet: bool) -> None:
        self.quiet, self.bar = quiet or parallel.rank() > 0, None
        if self.quiet or not sys.stderr.isatty():
            return
        try:
            from tqdm import tqdm
        except ImportError:
            return
        self.bar = tqdm(
            total=total * batch_rows,
            initial=done * batch_rows,
            unit=" rows",
            unit_scale=True,
            dynamic_ncols=True,
            leave=False,
            file=sys.stderr,
        )

    def advance(self, rows: int) -> None:
        if self.bar is not None:
            self.bar.update(rows)

    def show(self, means: dict[str, Any]) -> None:
        if self.bar is not None:
            text = f"loss {means['loss']:.3f}, right {percents(means['accuracy'])}"
            self.bar.set_postfix_str(text, refresh=False)

    def end_epoch(self, record: dict[str, Any], epochs: int) -> None:
        if self.quiet:
            return
        text = (
            f"epoch {record['epoch']:>{len(str(epochs))}}/{epochs}  loss {record['loss']:.4f}"
            f"  held out {percents(record['held_out']['accuracy'])}"
            f"  {record['rows_per_second']:,.0f} rows/s"
        )
        self.say(text)

    def say(self, text: str) -> None:
        """One line on standard error, above the progress line if there is one."""
        if self.bar is not None:
            self.bar.write(text, file=sys.stderr)
        elif not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def percents(values: Sequence[float]) -> str:
    """``97.2 98.1 98.6 %``: one number per exit, shallow to deep."""
    return " ".join(f"{100 * value:.1f}" for value in values) + " %"

# SPDX-License-Identifier: Apache-2.0
"""What a runner hands out: answers in the caller's order, and who left where at what price."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Answers(NamedTuple):
    """Of every row, in the caller's order: [N] each.

    ``exit_index`` 0-based int64, ``prediction`` int64, ``score`` float32 (float64 for float64).
    """

    exit_index: Tensor
    prediction: Tensor
    score: Tensor


@dataclass
class Report:
    """Sums over all rows since the runner was made or `clear` was called.

    ``entered[k]`` rows were computed by stage k, ``left[k]`` answered at exit k; ``stage_seconds``
    is the time inside the stages, ``seconds`` that of whole calls. ``madds`` [K] are the cumulative
    multiply-adds of one row up to each exit, where they are known.
    """

    entered: list[int]
    left: list[int]
    stage_seconds: list[float]
    seconds: float = 0.0
    madds: Sequence[float] | None = None
    calls: int = field(default=0)

    @classmethod
    def empty(cls, exits: int, madds: Sequence[float] | None = None) -> Report:
        return cls([0] * exits, [0] * exits, [0.0] * exits, madds=madds)

    def clear(self) -> None:
        exits = len(self.left)
        self.entered, self.left, self.stage_seconds = [0] * exits, [0] * exits, [0.0] * exits
        self.seconds, self.calls = 0.0, 0

    @property
    def rows(self) -> int:
        return sum(self.left)

    @property
    def share(self) -> list[float]:
        """The share of the rows that each exit answered."""
        return [n / max(self.rows, 1) for n in self.left]

    @property
    def mean_madds(self) -> float | None:
        """Predicted multiply-adds of a row: sum_k share_k madds_k."""
        if self.madds is None:
            return None
        return sum(s * m for s, m in zip(self.share, self.madds, strict=True))

    def to_dict(self) -> dict[str, Any]:
        """Plain data: one record per exit, and the whole."""
        columns = zip(self.entered, self.left, self.share, self.stage_seconds, strict=True)
        names = ("entered", "left", "share", "stage_seconds")
        return {
            "exits": [
                {"exit": k, **dict(zip(names, values, strict=True))}
                for k, values in enumerate(columns, 1)
            ],
            "rows": self.rows,
            "seconds": self.seconds,
            "madds": self.mean_madds,
        }


class Clock:
    """Seconds since the last `lap`, the work that a device was given included."""

    def __init__(self, device: torch.device) -> None:
        self.wait = torch.cuda.synchronize if device.type == "cuda" else None
        self.lap()

    def lap(self) -> float:
        if self.wait is not None:
            self.wait()
        now = time.perf_counter()
        seconds, self.last = now - getattr(self, "last", now), now
        return seconds

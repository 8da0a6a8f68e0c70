# SPDX-License-Identifier: Apache-2.0
"""Images held in memory: where they come from, how they are split, and who they are."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from msdkern.cli import CommandError
from msdkern.train.config import TrainConfig


@dataclass(frozen=True)
class Rows:
    """Images ``[N, H, W, C]`` (uint8 or float32) and their labels (int64 ``[N]``)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Dataset:
    """Sets of rows that share no row, and the numbers that normalise them."""

    train: Rows
    validation: Rows | None  # set aside from the training rows, to calibrate on
    held_out: Rows
    classes: tuple[str, ...]
    shift: int  # pixels by which --augment crop moves an image at most
    mirror: bool  # whether a mirrored image keeps its label
    mean: Tensor  # [C] of the training images
    std: Tensor  # [C]
    fingerprint: str  # SHA-256 of all pixels, labels and the splits
    best_accuracy: float | None = None  # of any classifier, where it is known

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """``(C, H, W)`` of one image."""
        height, width, channels = self.train.images.shape[1:]
        return channels, height, width


def load(config: TrainConfig) -> Dataset:
    """The data set that ``config`` names; loaded once per process.

    Raises ``CommandError`` when files are missing, unreadable or not what they should be.
    """
    splits = (config.held_out, config.validation, config.split_seed)
    return _load(config.data, config.root, *splits, _cache_dir(config))


def _cache_dir(config: TrainConfig) -> str:
    return str(Path(config.out).resolve().parent / "cache") if config.cache and config.out else ""


@lru_cache(maxsize=1)
def _load(
    data: str, root: str, held_out: float, validation: int, split_seed: int, cache: str
) -> Dataset:
    if root and data != "cifar10":
        raise CommandError(f"--root: --data {data} reads no folder; got {root!r}")
    known: dict[str, Any] = {"shift": 0, "mirror": False}
    classes = tuple("0123456789")
    if data == "cifar10":
        from msdkern.train.cifar import load_cifar10

        train, test, classes = load_cifar10(root, cache)
        known = {"shift": 4, "mirror": True}
    elif data == "digits":
        train, test = split(digits(), held_out, split_seed)
        known["shift"] = 1
    else:
        rows, known["best_accuracy"] = synthetic()
        train, test = split(rows, held_out, split_seed)
    train, aside = set_aside(train, validation, split_seed)
    return describe(train, test, classes, aside, **known)


def digits() -> Rows:
    """scikit-learn's 1,797 handwritten digits, 8x8 pixels of 0..16."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise CommandError(
            "--data digits: needs scikit-learn: pip install 'msdkern[train]'; --data synthetic"
            " needs nothing"
        ) from None
    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels.astype(np.uint8)).view(-1, 8, 8, 1)
    return Rows(images, torch.from_numpy(labels.astype(np.int64)))


def synthetic(count: int = 3000, classes: int = 10, signal: float = 3.0) -> tuple[Rows, float]:
    """Orthonormal 8x8 patterns in white noise, and the best accuracy that anything can reach.

    A row of class c is ``signal * pattern_c + noise``. The likeliest class is the one with the
    largest inner product, and it is right with probability E[Phi(z + signal)^(classes - 1)],
    z standard normal: the integral below.
    """
    generator = torch.Generator().manual_seed(20191109)
    noise = torch.randn(count, 64, generator=generator)
    patterns = torch.linalg.qr(torch.randn(64, 64, generator=generator))[0][:classes]
    labels = torch.arange(count) % classes
    z = torch.linspace(-10, 10, 20001, dtype=torch.float64)
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    best = torch.trapezoid(density * torch.special.ndtr(z + signal) ** (classes - 1), z)
    return Rows((signal * patterns[labels] + noise).view(-1, 8, 8, 1), labels), float(best)


def split(rows: Rows, held_out: float, seed: int) -> tuple[Rows, Rows]:
    """Training and held-out rows: of every class the same share, drawn with ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.zeros(len(rows), dtype=torch.bool)
    for label in rows.labels.unique():
        members = (rows.labels == label).nonzero().flatten()
        order = torch.randperm(len(members), generator=generator)
        chosen[members[order[: round(held_out * len(members))]]] = True
    if chosen.all() or not chosen.any():
        raise CommandError(f"--held-out: must leave rows on both sides; got {held_out}")
    pick = [Rows(rows.images[side], rows.labels[side]) for side in (~chosen, chosen)]
    return pick[0], pick[1]


def set_aside(rows: Rows, count: int, seed: int) -> tuple[Rows, Rows | None]:
    """The rows to train on, and ``count`` others drawn with ``seed`` (0: None)."""
    if count == 0:
        return rows, None
    if count >= len(rows):
        raise CommandError(
            f"--validation: must leave some of the {len(rows)} training rows; got {count}"
        )
    chosen = torch.zeros(len(rows), dtype=torch.bool)
    chosen[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:count]] = True
    return Rows(rows.images[~chosen], rows.labels[~chosen]), Rows(
        rows.images[chosen], rows.labels[chosen]
    )


def describe(
    train: Rows,
    held_out: Rows,
    classes: tuple[str, ...],
    validation: Rows | None = None,
    *,
    shift: int,
    mirror: bool,
    best_accuracy: float | None = None,
) -> Dataset:
    """Adds what follows from the rows: mean, standard deviation and fingerprint."""
    mean, std = channel_moments(train.images)
    digest = hashlib.sha256("\n".join(classes).encode())
    for rows in (train, held_out, *((validation,) if validation is not None else ())):
        digest.update(str(tuple(rows.images.shape)).encode())
        digest.update(rows.images.contiguous().numpy().data)
        digest.update(rows.labels.numpy().data)
    return Dataset(
        train,
        validation,
        held_out,
        classes,
        shift,
        mirror,
        mean,
        std,
        digest.hexdigest(),
        best_accuracy,
    )


def channel_moments(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation ``[C]``, summed in float64 a few thousand images at a time."""
    first = second = torch.zeros(images.shape[-1], dtype=torch.float64)
    for part in images.split(4096):
        pixels = part.flatten(0, 2).double()
        first, second = first + pixels.sum(0), second + pixels.square().sum(0)
    count = images[..., 0].numel()
    mean = first / count
    return mean.float(), (second / count - mean.square()).clamp_min(1e-12).sqrt().float()

# SPDX-License-Identifier: Apache-2.0
"""The order of the rows and their augmentation: a function of seed, epoch and batch number.

Nothing here has a state that a checkpoint would have to save: the epoch and the number of the
next batch say it all, so a resumed run draws what an uninterrupted one would have drawn.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from msdkern.cli import CommandError
from msdkern.train import parallel
from msdkern.train.config import TrainConfig
from msdkern.train.data import Dataset, Rows


def generator_for(*words: int) -> torch.Generator:
    """An independent generator for every tuple of integers, such as (seed, epoch)."""
    state = np.random.SeedSequence(words).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


class Normalise:
    """Pixels ``[B, H, W, C]`` to float32 ``[B, C, H, W]`` of mean 0 and deviation 1."""

    def __init__(self, dataset: Dataset, device: torch.device, channels_last: bool) -> None:
        self.mean, self.std = dataset.mean.to(device), dataset.std.to(device)
        self.layout = torch.channels_last if channels_last else torch.contiguous_format

    def __call__(self, pixels: Tensor) -> Tensor:
        images = ((pixels.float() - self.mean) / self.std).permute(0, 3, 1, 2)
        return images.contiguous(memory_format=self.layout)


class TrainBatches:
    """Batches of the training rows, shuffled and augmented; the rest of an epoch is dropped."""

    def __init__(self, config: TrainConfig, dataset: Dataset, device: torch.device) -> None:
        rows = dataset.train
        if config.batch_size * config.accumulate > len(rows):
            raise CommandError(
                f"--batch-size: {config.batch_size} x --accumulate {config.accumulate} must be at"
                f" most the {len(rows)} training rows"
            )
        self.copies = parallel.copies(config.parallel)
        if config.batch_size < self.copies:
            raise CommandError(
                f"--batch-size: must be at least the {self.copies} processes; got"
                f" {config.batch_size}"
            )
        self.seed, self.batch_size = config.seed, config.batch_size
        self.steps = len(rows) // (config.batch_size * config.accumulate)
        self.count = self.steps * config.accumulate
        self.shift = dataset.shift if config.augment != "none" else 0
        self.mirror = config.augment == "crop+flip" or (config.augment == "auto" and dataset.mirror)
        self.height, self.width = rows.images.shape[1:3]
        margin = (0, 0) + (self.shift,) * 4
        # One row per pixel, so that a batch is a single gather.
        self.padded_width = self.width + 2 * self.shift
        self.image_size = self.padded_width * (self.height + 2 * self.shift)
        self.pixels = F.pad(rows.images, margin).flatten(0, 2).to(device)
        self.labels = rows.labels.to(device)
        self.normalise = Normalise(dataset, device, config.channels_last)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and labels of the batches ``start``, ``start + 1``, ... of one epoch.

        Every process draws the order of the whole batch and takes its part.
        """
        generator, count = generator_for(self.seed, epoch), len(self.labels)
        order = torch.randperm(count, generator=generator)
        offset = torch.randint(2 * self.shift + 1, (2, count), generator=generator)
        mirrored = (torch.rand(count, generator=generator) < 0.5) & self.mirror
        for batch in range(start, self.count):
            span = slice(batch * self.batch_size, (batch + 1) * self.batch_size)
            yield self._batch(
                parallel.part(order[span], self.copies),
                parallel.part(offset[:, span], self.copies, 1),
                parallel.part(mirrored[span], self.copies),
            )

    def _batch(self, rows: Tensor, offset: Tensor, mirrored: Tensor) -> tuple[Tensor, Tensor]:
        across = torch.arange(self.width).expand(len(rows), -1)
        across = torch.where(mirrored[:, None], across.flip(1), across) + offset[1][:, None]
        down = torch.arange(self.height) + offset[0][:, None]
        index = (down * self.padded_width)[:, :, None] + across[:, None, :]
        index = (index + (rows * self.image_size)[:, None, None]).flatten()
        device = self.pixels.device
        pixels = self.pixels.index_select(0, index.to(device, non_blocking=True))
        images = self.normalise(pixels.view(len(rows), self.height, self.width, -1))
        return images, self.labels[rows.to(device, non_blocking=True)]


def in_order(
    rows: Rows, normalise: Normalise, batch_size: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """All rows, neither shuffled nor augmented: what an evaluation reads."""
    for images, labels in zip(
        rows.images.split(batch_size), rows.labels.split(batch_size), strict=True
    ):
        yield normalise(images.to(device)), labels.to(device)

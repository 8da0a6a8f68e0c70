# SPDX-License-Identifier: Apache-2.0
"""Which rows fit temperatures, which choose thresholds, and which are left to report on."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from msdkern.cli import CommandError
from msdkern.train.batches import generator_for
from msdkern.train.data import Dataset, Rows

if TYPE_CHECKING:
    from msdkern.train.evaluate import Trained

SEED = 1  # of the cut into parts
SEEN = (
    "this run set no training rows aside (msdkern train --validation N), so two thirds of the"
    " held-out rows calibrate and only the last third reports"
)


class Sets(NamedTuple):
    """Rows that the network was not trained on, by what they are for.

    No row of ``report`` is in the others. ``source`` says where the others come from.
    """

    temperature: Rows
    thresholds: Rows
    report: Rows
    source: str  # "validation" or "held-out"


def sets_of(dataset: Dataset, apart: bool = False) -> Sets:
    """The rows that training set aside calibrate, all held-out rows report.

    Without such rows the held-out ones are cut into thirds, always the same.

    Args:
        dataset: of the run.
        apart: temperatures and thresholds must not share rows, as a bound on the risk demands.

    Raises ``CommandError`` when there are too few rows.
    """
    if dataset.validation is None:
        first, second, third = _cut(dataset.held_out, 3, "held-out")
        return Sets(first, second, third, "held-out")
    first = second = dataset.validation
    if apart:
        first, second = _cut(dataset.validation, 2, "validation")
    return Sets(first, second, dataset.held_out, "validation")


def _cut(rows: Rows, parts: int, name: str) -> list[Rows]:
    if len(rows) < parts:
        raise CommandError(f"calibrate: needs at least {parts} {name} rows; got {len(rows)}")
    order = torch.randperm(len(rows), generator=generator_for(SEED))
    return [Rows(rows.images[i], rows.labels[i]) for i in order.tensor_split(parts)]


def logits_of(trained: Trained, rows: Rows) -> tuple[Tensor, Tensor]:
    """[K, n, C] of all exits, and the labels."""
    from msdkern.infer.measure import batches_of, precision

    with torch.no_grad(), precision(trained):
        found = [
            (torch.stack(trained.model(images)), labels)
            for images, labels in batches_of(trained, rows)
        ]
    return torch.cat([z for z, _ in found], 1), torch.cat([y for _, y in found])

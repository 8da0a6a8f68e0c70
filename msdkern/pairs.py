# SPDX-License-Identifier: Apache-2.0
"""Named pair weights as matrices: who teaches whom among K exits.

Each function returns W[K, K] in float32, where W[i, j] is the weight that student i gives to
teacher j. Passing the name (`pair_weight="mutual"`) means the same weights, computed in O(K).
The diagonal is 0, and so is every weight when K = 1. Columns for external teachers are yours to
append: `torch.cat([msdkern.pairs.mutual(K), external], dim=1)`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from msdkern.reference import pair_weight_matrix


def _matrix(name: str, exits: int, device: torch.device | str | None) -> Tensor:
    if exits < 1:
        raise ValueError(f"pairs.{name}: the number of exits must be at least 1; got {exits}")
    return torch.tensor(pair_weight_matrix(name, exits), dtype=torch.float32, device=device)


def mutual(exits: int, device: torch.device | str | None = None) -> Tensor:
    """Every other exit teaches: W[i, j] = 1 / (K - 1) off the diagonal (MSD, DML, DKS)."""
    return _matrix("mutual", exits, device)


def last(exits: int, device: torch.device | str | None = None) -> Tensor:
    """The deepest exit teaches all others: W[i, K - 1] = 1 (BYOT, SCAN, Phuong & Lampert)."""
    return _matrix("last", exits, device)


def deeper(exits: int, device: torch.device | str | None = None) -> Tensor:
    """Every deeper exit teaches: W[i, j] = 1 / (K - 1 - i) for j > i (Zero Time Waste)."""
    return _matrix("deeper", exits, device)


def next(exits: int, device: torch.device | str | None = None) -> Tensor:
    """The next deeper exit teaches: W[i, i + 1] = 1."""
    return _matrix("next", exits, device)

# SPDX-License-Identifier: Apache-2.0
"""Feature imitation: every exit's feature vector is drawn towards a better one, in plain PyTorch.

Methods agree on the squared distance and on little else; the table below is what they divide by.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

# reduction: total over (difference [N, D], number of rows) -> 0-d
REDUCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    # mean over rows of the squared L2 norm
    "mean": lambda d, rows: d.square().sum() / rows,
    # sum over rows and components: its weight must shrink as the batch grows (BYOT, SCAN)
    "sum": lambda d, rows: d.square().sum(),
    # mean over rows and components, as torch.nn.MSELoss
    "elementmean": lambda d, rows: d.square().sum() / (rows * max(d.shape[1], 1)),
    # L2 norm of the whole difference, not squared, as torch.dist
    "norm": lambda d, rows: torch.linalg.vector_norm(d),
}

# imitate: the vector that is imitated, from all K of them
TARGETS: dict[str, Callable[[list[Tensor]], Tensor]] = {
    "last": lambda vectors: vectors[-1],
    "mean": lambda vectors: torch.stack(vectors).mean(0),
}


def feature_loss(
    features: Sequence[Tensor],
    valid: Tensor | None = None,
    *,
    reduction: str = "mean",
    imitate: str = "last",
    relu_mask: bool = False,
    detach: bool = True,
    weight: Sequence[float] | None = None,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """Distance of the exits' features from the deepest one's (the last term of equation 8).

    Formula, ``reduction="mean"``, R the valid rows::

        sum_{i < K} w_i / |R| sum_{n in R} || F_i[n] - F_K[n] ||^2

    Args:
        features: K tensors [N, ...] of one shape, flattened to [N, D]; any floating dtype.
        valid: bool [N], rows that count; default all. Other rows get a zero gradient.
        reduction: "mean" over valid rows of the squared L2 norm; "sum" over rows and components;
            "elementmean" over rows and components; "norm", the L2 norm of all valid rows at once.
        imitate: "last", the deepest exit's feature (K - 1 terms), or "mean" of all (K terms).
        relu_mask: count a component only where F_i or what it imitates is positive (BYOT).
        detach: what is imitated receives no gradient.
        weight: w, one number per term; default ones.
        normalizer: replaces |R| in "mean" and "elementmean"; a number or a 0-d tensor.

    Returns:
        A differentiable scalar, float32 (float64 for float64 features). No valid row: 0, with
        zero gradients. K = 1: 0.

    Raises:
        ValueError: for shapes that differ, an unknown choice, or a wrong number of weights.
    """
    vectors = _vectors(features)
    _choice("reduction", reduction, REDUCTIONS)
    _choice("imitate", imitate, TARGETS)
    imitated = TARGETS[imitate](vectors)
    if detach:
        imitated = imitated.detach()
    students = vectors[:-1] if imitate == "last" else vectors
    if weight is not None and len(weight) != len(students):
        rule = f"feature_loss: weight must have {len(students)} numbers, one per term"
        raise ValueError(f"{rule}; got {len(weight)}")
    rows = _rows(vectors[0], valid, normalizer)
    # A sum over nothing: the deepest exit, which has no term, still gets a gradient of zeros.
    total = vectors[-1][:0].sum()
    for i, student in enumerate(students):
        difference = _masked(student - imitated, valid)
        if relu_mask:
            difference = difference * ((student > 0) | (imitated > 0))
        term = REDUCTIONS[reduction](difference, rows)
        total = total + (term if weight is None else weight[i] * term)
    return total


def anneal(progress: float, begin: float, end: float) -> float:
    """beta_t of equation 8: a half cosine from begin (progress 0) to end (progress 1)."""
    return end + (begin - end) * (1.0 + math.cos(math.pi * progress)) / 2.0


def _vectors(features: Sequence[Tensor]) -> list[Tensor]:
    shapes = [tuple(f.shape) for f in features]
    if not shapes or len(set(shapes)) != 1 or not shapes[0]:
        rule = "feature_loss: features must be K tensors [N, ...] of one shape"
        raise ValueError(f"{rule}; got {[list(shape) for shape in shapes]}")
    wide = torch.float64 if features[0].dtype == torch.float64 else torch.float32
    return [f.reshape(f.shape[0], -1).to(wide) for f in features]


def _rows(like: Tensor, valid: Tensor | None, normalizer: float | Tensor | None) -> Tensor:
    """What a mean over rows divides by, as a 0-d tensor: never read on the host, never zero."""
    if isinstance(normalizer, Tensor):
        return normalizer.to(like.device, like.dtype)
    if normalizer is not None:
        return torch.full((), float(normalizer), dtype=like.dtype, device=like.device)
    if valid is None:
        return torch.full((), max(like.shape[0], 1), dtype=like.dtype, device=like.device)
    return valid.sum().clamp(min=1).to(like.dtype)


def _masked(rows: Tensor, valid: Tensor | None) -> Tensor:
    # Masked before squaring: an infinite feature in an ignored row must not reach the gradient.
    return rows if valid is None else torch.where(valid[:, None], rows, 0.0)


def _choice(name: str, value: str, table: Mapping[str, object]) -> None:
    if value not in table:
        raise ValueError(f"feature_loss: {name} must be one of {', '.join(table)}; got {value!r}")

# SPDX-License-Identifier: Apache-2.0
"""Feature imitation: every exit's feature vector is drawn towards a better one, in plain PyTorch.

Methods agree on the squared distance and on little else; the table below is what they divide by.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

# reduction: (differences [M, N, D], number of rows) -> M terms
REDUCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    # mean over rows of the squared L2 norm
    "mean": lambda d, rows: d.square().sum((1, 2)) / rows,
    # sum over rows and components: its weight must shrink as the batch grows (BYOT, SCAN)
    "sum": lambda d, rows: d.square().sum((1, 2)),
    # mean over rows and components, as torch.nn.MSELoss
    "elementmean": lambda d, rows: d.square().sum((1, 2)) / (rows * max(d.shape[2], 1)),
    # L2 norm of the whole difference, not squared, as torch.dist
    "norm": lambda d, rows: torch.linalg.vector_norm(d, dim=(1, 2)),
}

# imitate: (vectors [K, N, D]) -> (those that imitate [M, N, D], what they imitate [N, D])
TARGETS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "last": lambda vectors: (vectors[:-1], vectors[-1]),
    "mean": lambda vectors: (vectors, vectors.mean(0)),
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
    _choice("reduction", reduction, REDUCTIONS)
    _choice("imitate", imitate, TARGETS)
    students, imitated = TARGETS[imitate](_stacked(features))
    if detach:
        imitated = imitated.detach()
    difference = students - imitated
    if valid is not None:
        # Before squaring: an infinite feature in an ignored row must not reach the gradient.
        difference = torch.where(valid[:, None], difference, 0.0)
    if relu_mask:
        difference = difference * ((students > 0) | (imitated > 0))
    terms = REDUCTIONS[reduction](difference, _rows(imitated, valid, normalizer))
    if weight is None:
        return terms.sum()
    if len(weight) != len(terms):
        rule = f"feature_loss: weight must have {len(terms)} numbers, one per term"
        raise ValueError(f"{rule}; got {len(weight)}")
    weighted = (w * term for w, term in zip(weight, terms, strict=True))
    return sum(weighted, terms[:0].sum())


def anneal(progress: float, begin: float, end: float) -> float:
    """beta_t of equation 8: a half cosine from begin (progress 0) to end (progress 1)."""
    return end + (begin - end) * (1.0 + math.cos(math.pi * progress)) / 2.0


def _stacked(features: Sequence[Tensor]) -> Tensor:
    """[K, N, D] in the accumulation dtype: a dozen calls for all exits instead of for each."""
    shapes = [tuple(f.shape) for f in features]
    if not shapes or len(set(shapes)) != 1 or not shapes[0]:
        rule = "feature_loss: features must be K tensors [N, ...] of one shape"
        raise ValueError(f"{rule}; got {[list(shape) for shape in shapes]}")
    wide = torch.float64 if features[0].dtype == torch.float64 else torch.float32
    return torch.stack([f.flatten(1) if f.dim() != 1 else f[:, None] for f in features]).to(wide)


def _rows(like: Tensor, valid: Tensor | None, normalizer: float | Tensor | None) -> Tensor:
    """What a mean over rows divides by, as a 0-d tensor: never read on the host, never zero."""
    if isinstance(normalizer, Tensor):
        rows = normalizer.to(like.device, like.dtype)
        return torch.where(rows > 0, rows, torch.inf)  # 0, nothing counted, gives 0
    if normalizer is not None:
        count = float(normalizer) or math.inf
        return torch.full((), count, dtype=like.dtype, device=like.device)
    if valid is None:
        return torch.full((), max(like.shape[0], 1), dtype=like.dtype, device=like.device)
    return valid.sum().clamp(min=1).to(like.dtype)


def _choice(name: str, value: str, table: Mapping[str, object]) -> None:
    if value not in table:
        raise ValueError(f"feature_loss: {name} must be one of {', '.join(table)}; got {value!r}")

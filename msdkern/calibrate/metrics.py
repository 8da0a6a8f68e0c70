# SPDX-License-Identifier: Apache-2.0
"""How far confidences can be trusted, per exit, from the statistics of one read of the logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from msdkern import reference
from msdkern.ops import checks
from msdkern.ops.gate import ExitStatistics, exit_statistics

SCHEMES = ("width", "mass")
NORMS = ("l1", "l2", "max")


class Bins(NamedTuple):
    """Rows by confidence: how many, their mean confidence and their accuracy, [bins] each.

    Means of an empty bin are 0. Float64; the last axis is that of the bins.
    """

    count: Tensor  # type: ignore[assignment]
    confidence: Tensor
    accuracy: Tensor


def reliability(confidence: Tensor, correct: Tensor, bins: int = 15, scheme: str = "width") -> Bins:
    """The numbers of a reliability diagram.

    Args:
        confidence: [n] or [K, n], between 0 and 1.
        correct: bool, of the same shape.
        bins: how many.
        scheme: "width": [0, 1/bins), ..., and a confidence of exactly 1 belongs to the last bin;
            "mass": equally many rows each, in order of confidence (row counts differ by at most
            one), which does not leave almost all rows in one bin.

    Raises: ValueError, TypeError with one sentence.
    """
    op = "reliability"
    _check(op, confidence, correct, bins)
    checks.choice(op, "scheme", scheme, SCHEMES)
    rows = confidence.shape[-1]
    if scheme == "width":
        edges = torch.linspace(0, 1, bins + 1, dtype=confidence.dtype, device=confidence.device)
        place = torch.bucketize(confidence, edges, right=True).sub_(1).clamp_(0, bins - 1)
    else:
        rank = confidence.argsort(dim=-1, stable=True).argsort(dim=-1)
        place = rank * bins // max(rows, 1)
    shape = (*confidence.shape[:-1], bins)
    zero = torch.zeros(shape, dtype=torch.float64, device=confidence.device)
    count = zero.scatter_add(-1, place, torch.ones_like(confidence, dtype=torch.float64))
    share = reference.reciprocal(count)
    sums = [zero.scatter_add(-1, place, x.double()) for x in (confidence, correct)]
    return Bins(count, sums[0] * share, sums[1] * share)


def expected_calibration_error(
    confidence: Tensor,
    correct: Tensor,
    bins: int = 15,
    scheme: str = "width",
    norm: str = "l1",
) -> Tensor:
    """ECE = sum_b n_b / n |accuracy_b - confidence_b|, of one exit (0-d) or of K ([K]).

    ``norm="l2"``: the root of the weighted mean square; ``"max"``: the largest gap of a bin that
    holds rows. Arguments as in `reliability`. Naeini et al., AAAI 2015; Guo et al., ICML 2017.

    Raises: ValueError, TypeError with one sentence.
    """
    checks.choice("expected_calibration_error", "norm", norm, NORMS)
    found = reliability(confidence, correct, bins, scheme)
    gap = (found.accuracy - found.confidence).abs()
    if norm == "max":
        return gap.amax(-1)
    weight = found.count / max(confidence.shape[-1], 1)
    return (weight * gap).sum(-1) if norm == "l1" else (weight * gap.square()).sum(-1).sqrt()


def negative_log_likelihood(
    logits: Tensor | Sequence[Tensor], target: Tensor, statistics: ExitStatistics | None = None
) -> Tensor:
    """Mean of lse - z_y per exit: [K], float64.

    Args:
        logits: K tensors [n, C] or one [K, n, C].
        target: int64 [n].
        statistics: `msdkern.exit_statistics` of these logits, where they are at hand.

    Raises: ValueError, TypeError with one sentence.
    """
    label, known = _labelled("negative_log_likelihood", logits, target, statistics)
    return (known.lse.double() - label).mean(-1)


def brier_score(
    logits: Tensor | Sequence[Tensor], target: Tensor, statistics: ExitStatistics | None = None
) -> Tensor:
    """Mean of sum_c (p_c - [c = y])^2 = sum p^2 - 2 p_y + 1 per exit: [K], float64, 0 to 2.

    Arguments as in `negative_log_likelihood`. Raises: ValueError, TypeError with one sentence.
    """
    label, known = _labelled("brier_score", logits, target, statistics)
    p = (label - known.lse.double()).exp()
    return (known.sum_squares.double() - 2 * p + 1).mean(-1)


def _labelled(
    op: str, logits: Tensor | Sequence[Tensor], target: Tensor, known: ExitStatistics | None
) -> tuple[Tensor, ExitStatistics]:
    """The logits of the labels [K, n] in float64, and the statistics."""
    z = checks.exits(op, logits)
    _, rows, classes = checks.rows_and_classes(op, z)
    z = [x.detach() for x in (z[0].unbind(0) if z[0].dim() == 3 else z)]
    check_target(op, target, rows, classes)
    label = torch.stack([x.gather(1, target[:, None])[:, 0].double() for x in z])
    return label, exit_statistics(z) if known is None else known


def check_target(op: str, target: Tensor, rows: int, classes: int) -> None:
    if not isinstance(target, Tensor) or target.dtype != torch.int64 or target.shape != (rows,):
        checks.fail(op, f"target must be int64 [{rows}]", target)
    if rows and not 0 <= int(target.min()) <= int(target.max()) < classes:
        wrong = target[(target < 0) | (target >= classes)][0]
        checks.fail(op, f"labels must be in [0, {classes})", int(wrong))


def _check(op: str, confidence: Tensor, correct: Tensor, bins: int) -> None:
    checks.plain(op, "confidence", confidence)
    if confidence.dim() not in (1, 2) or not confidence.is_floating_point():
        checks.fail(op, "confidence must be floating point [n] or [K, n]", confidence)
    if not isinstance(correct, Tensor) or correct.dtype != torch.bool:
        checks.fail(op, "correct must be a bool tensor", correct)
    if correct.shape != confidence.shape:
        checks.fail(op, f"correct must be {list(confidence.shape)} as the confidence", correct)
    if not isinstance(bins, int) or bins < 1:
        checks.fail(op, "bins must be at least 1", bins)
    if confidence.numel() and not bool(((confidence >= 0) & (confidence <= 1)).all()):
        checks.fail(op, "confidence must be between 0 and 1", f"{float(confidence.min())}")

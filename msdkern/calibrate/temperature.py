# SPDX-License-Identifier: Apache-2.0
"""One temperature per exit that makes its probabilities honest (Guo et al., ICML 2017).

The mean NLL of softmax(z / T) is convex in b = 1 / T, with the derivative
E_p[z] - z_y; and E_p[b z] = lse - entropy, both from one read of the scaled logits. So its root is
bracketed and found without a learning rate: deterministic, all exits at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from msdkern import reference
from msdkern.calibrate.metrics import check_target
from msdkern.ops import checks
from msdkern.ops.gate import exit_statistics

SMALLEST, LARGEST = 0.05, 50.0
STEPS = 60


def fit_temperature(logits: Tensor | Sequence[Tensor], target: Tensor) -> Tensor:
    """The temperature of each exit that minimises its negative log likelihood: [K], float64.

    Between 0.05 and 50, the ends included: an exit that is right about every row has no minimum.

    Args:
        logits: K tensors [n, C] or one [K, n, C] of a calibration set.
        target: int64 [n].

    Raises: ValueError, TypeError with one sentence.
    """
    op = "fit_temperature"
    z = checks.exits(op, logits)
    exits, rows, classes = checks.rows_and_classes(op, z)
    check_target(op, target, rows, classes)
    if rows == 0:
        checks.fail(op, "there must be at least one row", z[0])
    each = [x.detach() for x in (z[0].unbind(0) if z[0].dim() == 3 else z)]
    real = reference.accumulation_dtype(each[0].dtype)
    each = [x.to(real) for x in each]
    label = torch.stack([x.gather(1, target[:, None])[:, 0].double().mean() for x in each])
    if not bool(label.isfinite().all()):
        checks.fail(op, "the logits of the labels must be finite", label.tolist())

    def slope(log_b: Tensor) -> Tensor:
        b = log_b.exp()
        known = exit_statistics([x * scale for x, scale in zip(each, b.to(real), strict=True)])
        mean = (known.lse.double() - known.entropy.double()).mean(-1)
        return mean / b - label

    ends = torch.tensor([1 / LARGEST, 1 / SMALLEST], dtype=torch.float64, device=label.device)
    low, high = (end.log().expand(exits) for end in ends)
    return (-_root(slope, low, high)).exp()


def _root(slope, low: Tensor, high: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
    """Where a rising function crosses 0, element by element: regula falsi, Illinois variant.

    An end where it does not cross is the answer there.
    """
    at_low, at_high = slope(low), slope(high)
    below, above = at_high <= 0, at_low >= 0
    x, side = low, torch.zeros_like(low)
    for _ in range(STEPS):
        before = x
        x = (low * at_high - high * at_low) / (at_high - at_low)
        x = torch.where(x.isfinite() & (x > low) & (x < high), x, (low + high) / 2)
        y = slope(x)
        left = y < 0
        # The end that stays twice in a row counts half: both ends keep moving.
        at_high = torch.where(left & (side < 0), at_high / 2, torch.where(left, at_high, y))
        at_low = torch.where(~left & (side > 0), at_low / 2, torch.where(left, y, at_low))
        low, high = torch.where(left, x, low), torch.where(left, high, x)
        side = torch.where(left, -torch.ones_like(side), torch.ones_like(side))
        done = below | above | ((x - before).abs() < 1e-7) | (y == 0)
        if bool(done.all()):
            break
    ends = torch.where(below, high, low)
    return torch.where(below | above, ends, x)

# SPDX-License-Identifier: Apache-2.0
"""The data of one case, and the float64 truth that every contender must meet before it is timed.

The truth is written out in closed form, formula (6) for the loss, row block by row block, and
shares no code with any contender.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .baselines import Recipe
from .cases import Case

# Largest relative error that may still be timed. Every contender computes in float32; bfloat16
# results are rounded once when the gradient is stored.
TOLERANCE = {"float32": 3e-5, "bfloat16": 8e-3}
_TRUTH_ROWS = 2**24  # elements of one float64 row block, all exits together


class Problem:
    """Logits that require a gradient, labels, teachers and upstream gradients of one case."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.recipe = Recipe(case.weights(), case.pair, case.temperature)
        generator = torch.Generator(case.device).manual_seed(case.exits * 1009 + case.classes)
        count = case.exits + case.teachers

        def normal() -> Tensor:
            return torch.randn(case.rows, case.classes, generator=generator, device=case.device)

        # Exits of one network agree in part: a common term and a term of their own.
        common = normal().mul_(2)
        dtype = getattr(torch, case.dtype)
        everyone = [(common + normal()).to(dtype) for _ in range(count)]
        self.logits = [z.requires_grad_() for z in everyone[: case.exits]]
        self.teachers = everyone[case.exits :]
        self.target = torch.randint(
            case.classes, (case.rows,), generator=generator, device=case.device
        )
        if case.family == "gate":
            self.recipe = self.recipe._replace(threshold=_halfway(self.logits[0]))
        self.upstream: list[Tensor] | None = None
        if case.family == "softmax":
            self.upstream = [normal().to(dtype) for _ in range(case.exits)]
        self._copies = [self.logits]

    def multiply(self, copies: int) -> None:
        """Keeps the logits so many times over, for `rotate`."""
        for _ in range(copies - 1):
            self._copies.append([z.detach().clone().requires_grad_() for z in self.logits])

    def rotate(self) -> None:
        """Goes on to the next copy of the logits, so that no call meets what the one before left
        in a cache. Contenders ask for the logits when they are called."""
        self._copies.append(self._copies.pop(0))
        self.logits = self._copies[0]

    @property
    def copies(self) -> int:
        return len(self._copies)

    @property
    def bytes(self) -> int:
        """Bytes of one pass over the logits."""
        return sum(z.numel() * z.element_size() for z in self.logits)

    @functools.cached_property
    def truth(self) -> Truth:
        """The float64 answer; gradients are kept as float32 to halve their room."""
        return TRUTHS[self.case.family](self)

    def gradients(self, outputs: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Backward through autograd, as a training step asks for it."""
        return torch.autograd.grad(outputs, self.logits, self.upstream)

    def check(self, outputs: Tensor | Sequence[Tensor]) -> dict[str, float]:
        """Relative errors of outputs and gradients against the truth.

        Raises: WrongResult when one of them is not small.
        """
        found = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        errors = {"value": _worst(found, self.truth.outputs, self.logits)}
        if self.truth.gradients is not None:
            errors["gradient"] = _worst(self.gradients(outputs), self.truth.gradients, self.logits)
        bound = TOLERANCE[self.case.dtype]
        for what, error in errors.items():
            if not error <= bound:
                raise WrongResult(
                    f"{what} is wrong: relative error must be at most {bound:g}; got {error:.3g}"
                )
        return errors


class WrongResult(Exception):
    """A contender that disagrees with the truth; it is reported as wrong and never timed."""


class Truth(NamedTuple):
    """Float64 outputs, and gradients of the logits where the family has them."""

    outputs: list[Tensor]
    gradients: list[Tensor] | None


def _worst(found: Sequence[Tensor], truth: Sequence[Tensor], logits: list[Tensor]) -> float:
    """Largest relative error over all tensors; [K, N] integers are predictions of the logits."""
    if len(found) == len(truth) + 1:  # all rows in order, and how many of them stay
        *found, order, count = found
        found = [*found, order[: int(count)]]
    if len(found) != len(truth):
        raise WrongResult(f"number of tensors is wrong: must be {len(truth)}; got {len(found)}")
    errors = []
    for x, t in zip(found, truth, strict=True):
        if x.shape != t.shape:
            raise WrongResult(f"shape is wrong: must be {list(t.shape)}; got {list(x.shape)}")
        if not t.is_floating_point() and t.dim() < 2:
            errors.append(0.0 if torch.equal(x, t) else math.inf)
        elif not t.is_floating_point():
            errors.append(_prediction_error(x, logits))
        else:
            errors.append(_relative_error(x.detach(), t))
    return max(errors)


def _relative_error(x: Tensor, truth: Tensor) -> float:
    """The larger of the errors in the 2-norm and in the maximum norm; NaN where x has one."""
    difference = x.double() - truth.double()
    norms = (float("inf"), 2.0)
    ratios = [
        torch.linalg.vector_norm(difference, p) / torch.linalg.vector_norm(truth.double(), p)
        for p in norms
    ]
    return float(torch.stack(ratios).max())


def _prediction_error(prediction: Tensor, logits: list[Tensor]) -> float:
    """0 when every predicted class has its row's largest logit (rounding makes ties), else inf."""
    for row, z in zip(prediction, logits, strict=True):
        if not torch.equal(z.gather(1, row[:, None])[:, 0], z.amax(1)):
            return math.inf
    return 0.0


def _blocks(problem: Problem) -> range:
    case = problem.case
    step = max(1, _TRUTH_ROWS // ((case.exits + case.teachers) * case.classes))
    return range(0, case.rows, step)


def _loss_truth(problem: Problem) -> Truth:
    value = torch.zeros((), dtype=torch.float64, device=problem.target.device)
    gradients = [torch.empty_like(z, dtype=torch.float32) for z in problem.logits]
    starts = _blocks(problem)
    for start in starts:
        rows = slice(start, start + starts.step)
        value += _loss_block(problem, rows, [g[rows] for g in gradients])
    return Truth([value], [g.detach() for g in gradients])


@torch.no_grad()
def _loss_block(problem: Problem, rows: slice, gradients: list[Tensor]) -> Tensor:
    """Adds one row block to the loss and writes its rows of the gradients."""
    n, t = problem.case.rows, problem.recipe.temperature
    z = [x[rows].double() for x in (*problem.logits, *problem.teachers)]
    label = problem.target[rows, None]
    log_q = [torch.log_softmax(x / t, 1) for x in z]
    total = torch.zeros_like(z[0][0, 0])
    for i, gradient in enumerate(gradients):
        log_p = torch.log_softmax(z[i], 1)
        total -= log_p.gather(1, label).sum()
        d = log_p.exp()
        d.scatter_add_(1, label, torch.full_like(d[:, :1], -1.0))
        for weight, teacher in zip(problem.recipe.weights[i], log_q, strict=True):
            if weight:
                q = teacher.exp()
                total += weight * t * t * (q * (teacher - log_q[i])).sum()
                d += weight * t * (log_q[i].exp() - q)
        gradient.copy_(d / n)
    return total / n


@torch.no_grad()
def _softmax_truth(problem: Problem) -> Truth:
    t = problem.recipe.temperature
    outputs, gradients = [], []
    for z, upstream in zip(problem.logits, problem.upstream or [], strict=True):
        q, g = torch.softmax(z.double() / t, 1), upstream.double()
        outputs.append(q)
        gradients.append(q * (g - (g * q).sum(1, keepdim=True)) / t)
    return Truth(outputs, gradients)


@torch.no_grad()
def _statistics_truth(problem: Problem) -> Truth:
    rows = []
    for logits in problem.logits:
        z = logits.double()
        lse = torch.logsumexp(z, 1)
        p = (z - lse[:, None]).exp()
        top, index = p.topk(2, 1)
        entropy = torch.special.entr(p).sum(1)
        margin = top[:, 0] - top[:, 1]
        rows.append((lse, top[:, 0], index[:, 0], margin, entropy, (p * p).sum(1)))
    return Truth([torch.stack(column) for column in zip(*rows, strict=True)], None)


@torch.no_grad()
def _gate_truth(problem: Problem) -> Truth:
    (logits,) = problem.logits
    p = torch.softmax(logits.double(), 1)
    confidence, prediction = p.max(1)
    stays = confidence < problem.recipe.threshold
    return Truth([prediction[None], confidence, stays.nonzero()[:, 0]], None)


def _halfway(logits: Tensor) -> float:
    """A confidence that half of the rows reach, and that no rounding turns into another answer."""
    confidence = torch.softmax(logits.detach().double(), 1).amax(1).sort().values
    middle = len(confidence) // 2
    around = confidence[max(middle - 1, 0) : middle + 1]
    return float(around.mean())


TRUTHS: dict[str, Callable[[Problem], Truth]] = {
    "loss": _loss_truth,
    "softmax": _softmax_truth,
    "statistics": _statistics_truth,
    "gate": _gate_truth,
}

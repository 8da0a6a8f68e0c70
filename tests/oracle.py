# SPDX-License-Identifier: Apache-2.0
"""The truth in float64, what plain PyTorch makes of the same problem, and the error budget.

`truth` evaluates the forward formulas of msdkern/reference.py in float64 and lets autograd
differentiate them: the closed-form gradients are not involved. `peer` is the loss as people write
it (F.cross_entropy, F.kl_div, autograd) in the dtype that accumulates for the logits' dtype. For
half precision that is float32, which is stricter than PyTorch in half precision.

The budget: |ours - truth| <= |peer - truth| + a few roundings of the terms that are summed,
element by element. Where the peer is not finite (0 * inf) only the roundings are left.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from msdkern import reference

# How many roundings of its terms a result may be off. In float64 the truth has roundings of its
# own: those of autograd through a normaliser.
ROUNDINGS = {torch.float32: 8.0, torch.float64: 256.0}


def double(value: Any) -> Any:
    """The same in float64, as a leaf of its own."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().to(torch.float64, copy=True)
    return [double(v) for v in value] if isinstance(value, (list, tuple)) else value


@dataclasses.dataclass(frozen=True)
class Problem:
    """One call: K logits [N, C] and the keyword arguments of `multi_exit_loss`."""

    logits: list[Tensor]
    options: dict[str, Any]

    def option(self, name: str) -> Any:
        return self.options.get(name, DEFAULTS[name])

    @property
    def shape(self) -> tuple[int, int, int]:
        return (len(self.logits), *self.logits[0].shape)

    @property
    def teachers(self) -> list[Tensor]:
        return list(self.option("teacher_logits") or ())

    def weights(self) -> Tensor:
        """W[K, K + E, N] in float64, from the definitions of the names."""
        exits, rows, _ = self.shape
        given, width = self.option("pair_weight"), exits + len(self.teachers)
        if isinstance(given, Tensor):
            given = given.to(torch.float64)
            return (given if given.dim() == 3 else given.unsqueeze(-1)).expand(-1, -1, rows)
        weight = torch.zeros(exits, width, rows, dtype=torch.float64)
        for i in range(exits):
            for j in range(exits):
                weight[i, j] = named_weight(given, i, j, exits)
        return weight

    def exit_weights(self) -> Tensor:
        exits, rows, _ = self.shape
        given = self.option("exit_weight")
        if given is None:
            return torch.ones(exits, rows, dtype=torch.float64)
        given = given.to(torch.float64)
        return given if given.dim() == 2 else given.unsqueeze(-1).expand(-1, rows)

    def scale(self) -> float:
        t = float(self.option("temperature"))
        return float(self.option("pair_scale")) * (t * t if self.squared else 1.0)

    @property
    def squared(self) -> bool:
        return self.option("temperature_squared")

    def valid(self) -> Tensor:
        target = self.option("target")
        if target is None or target.is_floating_point():
            return torch.ones(self.shape[1], dtype=torch.bool)
        return target != self.option("ignore_index")

    def factors(self) -> tuple[float, float]:
        """(3) r of the cross entropies and r of the divergences."""
        if self.option("normalizer") is not None:
            return (1.0 / float(self.option("normalizer")),) * 2
        return self.mean_factors() if self.option("reduction") == "mean" else (1.0, 1.0)

    def mean_factors(self) -> tuple[float, float]:
        valid, weight, target = self.valid(), self.option("class_weight"), self.option("target")
        rows = float(valid.sum())
        labels = rows
        if weight is not None and target is not None and not target.is_floating_point():
            labels = float(weight.double()[target[valid]].sum())
        return (1.0 / labels if labels else 0.0), (1.0 / rows if rows else 0.0)


DEFAULTS: dict[str, Any] = {
    "target": None,
    "exit_weight": None,
    "pair_weight": None,
    "pair_scale": 1.0,
    "teacher_logits": None,
    "temperature": 1.0,
    "temperature_squared": True,
    "divergence": "forward_kl",
    "beta": 0.5,
    "detach_teacher": True,
    "class_weight": None,
    "ignore_index": -100,
    "label_smoothing": 0.0,
    "reduction": "mean",
    "normalizer": None,
    "pair_divergence": False,
}


def named_weight(name: str | None, i: int, j: int, exits: int) -> float:
    """The definitions, one by one; independent of msdkern.pairs."""
    if name is None or i == j:
        return 0.0
    if name == "mutual":
        return 1.0 / (exits - 1)
    if name == "last":
        return float(j == exits - 1)
    if name == "next":
        return float(j == i + 1)
    assert name == "deeper"
    return 1.0 / (exits - 1 - i) if j > i else 0.0


# Terms ----------------------------------------------------------------------------------------


def cross_entropies(problem: Problem, z: list[Tensor], plain: bool = False) -> Tensor:
    """CE_k[n], 0 on ignored rows: [K, N]."""
    target, weight = problem.option("target"), problem.option("class_weight")
    if target is None:
        return z[0].new_zeros(problem.shape[:2])
    target = target.to(z[0].dtype) if target.is_floating_point() else target
    weight = None if weight is None else weight.to(z[0].dtype)
    ignore, smoothing = problem.option("ignore_index"), problem.option("label_smoothing")
    if not plain:
        return torch.stack(
            [reference.cross_entropy(x, target, weight, ignore, smoothing) for x in z]
        )
    options = {"ignore_index": ignore, "label_smoothing": smoothing, "reduction": "none"}
    return torch.stack([F.cross_entropy(x, target, weight, **options) for x in z])


def plain_kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b) as people write it."""
    return F.kl_div(log_b, log_a, reduction="none", log_target=True).sum(-1)


def plain_jsd(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    if beta in (0.0, 1.0):
        return plain_kl(student, teacher) if beta else plain_kl(teacher, student)
    mixture = (beta * teacher.exp() + (1.0 - beta) * student.exp()).log()
    return beta * plain_kl(teacher, mixture) + (1.0 - beta) * plain_kl(student, mixture)


PLAIN_DIVERGENCES = {
    "forward_kl": lambda student, teacher, beta: plain_kl(teacher, student),
    "reverse_kl": lambda student, teacher, beta: plain_kl(student, teacher),
    "jsd": plain_jsd,
    "soft_ce": lambda student, teacher, beta: -(teacher.exp() * student).sum(-1),
}


def divergences(problem: Problem, z: list[Tensor], plain: bool = False) -> Tensor:
    """D_ij[n] for every pair with a weight (all, when they are asked for), 0 on ignored rows."""
    t, detach = float(problem.option("temperature")), problem.option("detach_teacher")
    name, beta = problem.option("divergence"), problem.option("beta")
    students = [F.log_softmax(x / t, dim=-1) for x in z]
    outside = [F.log_softmax(x.to(z[0].dtype) / t, dim=-1) for x in problem.teachers]
    teachers = [s.detach() for s in students] if detach else students
    weighs = problem.weights().ne(0).unsqueeze(-1)
    function = (PLAIN_DIVERGENCES if plain else reference.DIVERGENCES)[name]
    rows = []
    for i, s in enumerate(students):
        row = []
        for j, teacher in enumerate([*teachers, *outside]):
            if not (weighs[i, j].any() or problem.option("pair_divergence")):
                row.append(z[0].new_zeros(problem.shape[1]))
                continue
            # A pair without weight has no gradient, also where its divergence is infinite.
            pair = [torch.where(weighs[i, j], l, l.detach()) for l in (s, teacher)]
            row.append(function(*pair, beta))
        rows.append(torch.stack(row))
    keep = problem.valid()
    return torch.where(keep, torch.stack(rows), 0.0)


def evaluate(problem: Problem, dtype: torch.dtype, plain: bool) -> dict[str, Any]:
    """Every output of the three loss ops, in one dtype."""
    leaves = [x.detach().to(dtype, copy=True).requires_grad_() for x in problem.logits]
    keep = problem.valid().unsqueeze(-1)
    z = [torch.where(keep, x, 0.0) for x in leaves]  # (4) an ignored row has no influence at all
    ce, d = cross_entropies(problem, z, plain), divergences(problem, z, plain)
    weight = problem.weights().to(dtype)
    part = torch.where(weight == 0, 0.0, weight * d).sum(1) * problem.scale()
    weighted_ce = problem.exit_weights().to(dtype) * ce
    (r_ce, r_rows), (m_ce, m_rows) = problem.factors(), problem.mean_factors()
    loss = r_ce * weighted_ce.sum() + r_rows * part.sum()
    p = [F.softmax(x.detach(), dim=-1) for x in leaves]
    return {
        "logits": leaves,
        "loss": loss,
        "cross_entropy": m_ce * ce.detach().sum(-1),
        "divergence": m_rows * part.detach().sum(-1),
        "pair_divergence": m_rows * d.detach().sum(-1),
        "confidence": torch.stack([q.max(-1).values for q in p]) if problem.shape[1] else ce,
        "row_cross_entropy": weighted_ce,
        "row_divergence": part,
    }


def gradients(values: dict[str, Any], of: list[Tensor], upstream: list[Tensor]) -> list[Tensor]:
    """d(sum of <of, upstream>) / d logits, zeros where nothing depends on them."""
    z = values["logits"]
    pairs = [(y, g.to(y.dtype)) for y, g in zip(of, upstream, strict=True) if y.requires_grad]
    if not pairs:
        return [torch.zeros_like(x) for x in z]
    found = torch.autograd.grad(
        [y for y, _ in pairs], z, [g for _, g in pairs], allow_unused=True, retain_graph=True
    )
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, z, strict=True)]


def truth(problem: Problem) -> dict[str, Any]:
    return evaluate(problem, torch.float64, plain=False)


def peer(problem: Problem) -> dict[str, Any]:
    return evaluate(problem, reference.accumulation_dtype(problem.logits[0].dtype), plain=True)


# Budget ---------------------------------------------------------------------------------------


def magnitudes(problem: Problem, of_ce: Tensor, of_divergence: Tensor) -> dict[str, Any]:
    """Sizes of the terms whose roundings the results carry, for upstream gradients [K, N].

    `row_*` [K, N] belong to the row losses, `pairs` [K, K + E, N] to D_ij, `gradients` to dL/dz.
    """
    z, t = double(problem.logits), float(problem.option("temperature"))
    exits, rows, _ = problem.shape
    weight, scale, keep = problem.weights().abs(), abs(problem.scale()), problem.valid()
    log_q = [F.log_softmax(x / t, dim=-1) for x in [*z, *double(problem.teachers)]]
    # Errors of l grow with |z - max|; a class without mass carries none.
    reach = [(x - x.amax(-1, keepdim=True)).abs() / t for x in [*z, *double(problem.teachers)]]
    reach = [torch.where(r.isfinite(), r, 0.0) + 1.0 for r in reach]
    pairs = torch.zeros(exits, len(log_q), rows, dtype=torch.float64)
    result = [torch.zeros_like(x) for x in z]
    weighted = weight.sum(-1).tolist()
    for i in range(exits):
        for j in range(len(log_q)):
            if not weighted[i][j] and not problem.option("pair_divergence"):
                continue
            size = (log_q[i].exp() + log_q[j].exp()) * (reach[i] + reach[j])
            pairs[i, j] = size.sum(-1)
            if not weighted[i][j]:
                continue
            share = (of_divergence[i].abs() * weight[i, j] * scale / t).unsqueeze(-1)
            for k in {i, j} if j < exits and not problem.option("detach_teacher") else {i}:
                result[k] += share * (size + log_q[k].exp() * size.sum(-1, keepdim=True))
    return {
        "row_cross_entropy": _cross_entropy_sizes(problem, z, of_ce, result),
        "row_divergence": (weight * pairs).sum(1) * scale,
        "pairs": torch.where(keep, pairs, 0.0),
        "gradients": [torch.where(keep.unsqueeze(-1), g, 0.0) for g in result],
    }


def _cross_entropy_sizes(
    problem: Problem, z: list[Tensor], of_ce: Tensor, result: list[Tensor]
) -> Tensor:
    target, class_weight = problem.option("target"), problem.option("class_weight")
    ce = torch.zeros(problem.shape[:2], dtype=torch.float64)
    if target is None:
        return ce
    classes, smoothing = problem.shape[2], problem.option("label_smoothing")
    if not target.is_floating_point():
        target = F.one_hot(torch.where(problem.valid(), target, 0), classes)
    mass = target.to(torch.float64) * (1.0 - smoothing) + smoothing / classes
    mass = mass if class_weight is None else mass * class_weight.double()
    for k, x in enumerate(z):
        gap = x - x.amax(-1, keepdim=True)
        gap = torch.where(gap.isfinite(), gap.abs(), 0.0) + 1.0
        a = problem.exit_weights()[k]
        ce[k] = a.abs() * (mass.abs() * (gap + gap.log() + classes**0.5)).sum(-1)
        share = (of_ce[k] * a).abs().unsqueeze(-1)
        p = F.softmax(x, dim=-1)
        result[k] += share * (mass.abs().sum(-1, keepdim=True) * p * gap + mass.abs())
    return ce


def tolerance(dtype: torch.dtype) -> float:
    """Roundings of what is accumulated for logits of this dtype."""
    real = reference.accumulation_dtype(dtype)
    return ROUNDINGS[real] * torch.finfo(real).eps


def check(
    what: str,
    ours: Tensor,
    true: Tensor,
    peers: Tensor,
    size: Tensor | float,
    dtype: torch.dtype,
) -> None:
    """Fail, with the worst element, unless ours is inside the budget everywhere.

    `size` is that of the terms; `dtype` the dtype of the logits, to which gradients are rounded.
    """
    assert ours.shape == true.shape, f"{what}: shape {list(ours.shape)}, not {list(true.shape)}"
    ours64, true, peers = ours.detach().double(), true.detach().double(), peers.detach().double()
    theirs = (peers - true).abs()
    theirs = torch.where(theirs.isfinite(), theirs, 0.0)
    storage = torch.finfo(ours.dtype)
    rounding = true.abs() * storage.eps + storage.smallest_normal * storage.eps
    budget = theirs + tolerance(dtype) * size + torch.where(true.isfinite(), rounding, 0)
    budget = torch.where(budget.isnan(), 0.0, budget) + torch.finfo(torch.float32).tiny
    same = (ours64 == true) | ~(ours64.isfinite() | true.isfinite())
    # What rounds to infinity in the storage dtype may be infinite.
    same |= ours64.isinf() & (true.abs() > storage.max) & (ours64.sign() == true.sign())
    error = torch.where(same, 0.0, (ours64 - true).abs())
    excess = torch.where(error.isnan(), torch.inf, error / budget)
    if excess.numel() == 0 or bool((excess <= 1.0).all()):
        return
    flat = int(excess.argmax())
    index = tuple(int(x) for x in torch.unravel_index(torch.tensor(flat), excess.shape))
    raise AssertionError(
        f"{what}: outside the error budget at {list(index)} by {float(excess[index]):.3g}x: "
        f"ours {float(ours64[index])!r}, truth {float(true[index])!r}, "
        f"PyTorch {float(peers[index])!r}, budget {float(budget[index]):.3g} "
        f"({int((excess > 1).sum())} of {excess.numel()} elements)"
    )

# SPDX-License-Identifier: Apache-2.0
"""The mathematics of msdkern, written once, in the smallest PyTorch that is obviously right.

This file is four things at once: the `eager` executor's formulas, the truth that the tests
evaluate in float64, the decomposition that an exported program falls back to, and the
documentation. Kernels repeat only the row formulas and cite the equation numbers below.

Words: K exits (shallow to deep), N rows, C classes, E external teachers, temperature T.
z_k[N, C] are the logits of exit k, p_k = softmax(z_k), q_k = softmax(z_k / T), l_k = log q_k.
Student i learns from teacher j with weight W[i, j]; teachers K .. K+E-1 are external.

  (1) cross_entropy   CE_k[n]
  (2) divergence      D_ij[n]
  (3) total           L = sum_k sum_n r_n a_k[n] CE_k[n] + s sum_ij sum_n r_n W_ij[n] D_ij[n]
  (4) valid_rows      a row labelled ignore_index adds nothing and receives a zero gradient
  (5) teachers        detached by default; undetached is the true mutual gradient
  (6) gradients       dL/dz in closed form (the tests check them against autograd of (1)-(5))
  (7) statistics      lse, confidence, prediction, margin, entropy, sum p^2
  (8) MSD             see msdkern.nn.MSDLoss, which is (3) plus `feature_distance`
  (9) branches        see msdkern.models.add_exits
 (10) exit gate       the first exit whose score reaches its threshold answers; the last always does
 (11) gate step       one exit: the rows that stay in order, then the others in order, and a count
 (12) rows            gathered by such a list, and scattered back
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 logits, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def sizes(logits: Sequence[Tensor]) -> tuple[int, int, int]:
    """K, N and C of K tensors [N, C], or of a list of one tensor [K, N, C]."""
    shape = logits[0].shape
    return len(logits) if len(shape) == 2 else shape[0], shape[-2], shape[-1]


def log_softmax(logits: Tensor, temperature: Tensor | float = 1.0) -> Tensor:
    """l = log softmax(z / T) over the last dimension, accumulated in float32 (or float64)."""
    z = logits.to(accumulation_dtype(logits.dtype))
    return F.log_softmax(z / temperature, dim=-1)


def weigh(p: Tensor, x: Tensor) -> Tensor:
    """p x with 0 log 0 = 0: a class without mass adds nothing, also where x is infinite or NaN."""
    return p * torch.where(p == 0, torch.zeros_like(x), x)


# (1) ------------------------------------------------------------------------------------------


def target_mass(target: Tensor, class_weight: Tensor | None, label_smoothing: float) -> Tensor:
    """u[n, c]: what CE = -sum_c u_c log p_c puts on each class, for class probabilities."""
    mass = target * (1.0 - label_smoothing) + label_smoothing / target.shape[-1]
    return mass if class_weight is None else mass * class_weight


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """(1) CE[n] as `F.cross_entropy(..., reduction="none")`, for class indices or probabilities.

    One difference: a probability of 0 on a class masked with -inf adds 0, where PyTorch's
    0 * inf is NaN.
    """
    z = logits.to(accumulation_dtype(logits.dtype))
    if not target.is_floating_point():
        return F.cross_entropy(
            z,
            target,
            class_weight,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction="none",
        )
    mass = target_mass(target.to(z.dtype), class_weight, label_smoothing)
    return -weigh(mass, F.log_softmax(z, dim=-1)).sum(-1)


# (2) ------------------------------------------------------------------------------------------


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b) = sum_c a (log a - log b) + (b - a).

    The last bracket sums to zero in real arithmetic. It cancels the first-order effect that the
    rounding of the normalisers has on the value, which matters when a and b nearly agree.
    """
    a, b = log_a.exp(), log_b.exp()
    return (weigh(a, log_a - log_b) + (b - a)).sum(-1)


def forward_kl(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """KL(q_j || q_i)."""
    return kl(teacher, student)


def reverse_kl(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """KL(q_i || q_j)."""
    return kl(student, teacher)


def jsd(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """beta KL(q_j || m) + (1 - beta) KL(q_i || m), m = beta q_j + (1 - beta) q_i.

    The end points are the limits of the divergence divided by its vanishing weight: beta = 0 is
    forward KL and beta = 1 reverse KL (the convention of GKD, Agarwal et al., 2306.13649).
    """
    if beta in (0.0, 1.0):
        return (reverse_kl if beta else forward_kl)(student, teacher, beta)
    mixture = beta * teacher.exp() + (1.0 - beta) * student.exp()
    log_mixture = mixture.clamp_min(torch.finfo(mixture.dtype).tiny).log()
    return beta * kl(teacher, log_mixture) + (1.0 - beta) * kl(student, log_mixture)


def soft_ce(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """-sum_c q_j log q_i: forward KL plus the teacher's entropy."""
    return -weigh(teacher.exp(), student).sum(-1)


DIVERGENCES = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "soft_ce": soft_ce,
}


# Named pair weights: W[i, j] for student i and teacher j. The diagonal and K = 1 are 0.
PAIR_WEIGHTS = {
    "none": lambda i, j, exits: 0.0,
    "mutual": lambda i, j, exits: 1.0 / (exits - 1) if i != j else 0.0,
    "last": lambda i, j, exits: 1.0 if i < j == exits - 1 else 0.0,
    "deeper": lambda i, j, exits: 1.0 / (exits - 1 - i) if j > i else 0.0,
    "next": lambda i, j, exits: 1.0 if j == i + 1 else 0.0,
}


def pair_weight_matrix(name: str, exits: int) -> list[list[float]]:
    """The [K, K] matrix that a named pair weight stands for."""
    weight = PAIR_WEIGHTS[name]
    return [[weight(i, j, exits) for j in range(exits)] for i in range(exits)]


# (3), (4), (5) --------------------------------------------------------------------------------


def valid_rows(target: Tensor | None, rows: int, ignore_index: int, like: Tensor) -> Tensor:
    """(4) v[n] = 0 for rows labelled ignore_index, else 1."""
    if target is None or target.is_floating_point():
        return like.new_ones(rows)
    return (target != ignore_index).to(like.dtype)


def reciprocal(x: Tensor) -> Tensor:
    """1 / x, and 0 where x is 0: a mean over no rows is 0."""
    return torch.where(x > 0, 1.0 / torch.where(x > 0, x, 1.0), 0.0)


def mean_factors(
    target: Tensor | None, valid: Tensor, class_weight: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """(3) r for `mean`: 1 / sum of the label's class weights as in `F.cross_entropy`, and 1 / rows.

    The first factor belongs to the cross entropies, the second to the divergences.
    """
    rows = reciprocal(valid.sum())
    if target is None or class_weight is None or target.is_floating_point():
        return rows, rows
    label = torch.where(target == ignore_index, 0, target)
    return reciprocal((class_weight[label] * valid).sum()), rows


def divergence_matrix(
    logits: Sequence[Tensor],
    teacher_logits: Sequence[Tensor],
    temperature: Tensor | float,
    divergence: str,
    beta: float,
    detach_teacher: bool,
    wanted: Sequence[Sequence[bool]],
) -> Tensor:
    """(2), (5) D[K, K + E, N]; pairs that are not wanted stay 0."""
    students = [log_softmax(z, temperature) for z in logits]
    teachers = students + [log_softmax(z, temperature).detach() for z in teacher_logits]
    if detach_teacher:
        teachers = [l.detach() for l in teachers]
    function = DIVERGENCES[divergence]
    zero = students[0].new_zeros(students[0].shape[0])
    return torch.stack(
        [
            torch.stack([function(s, t, beta) if row[j] else zero for j, t in enumerate(teachers)])
            for s, row in zip(students, wanted, strict=True)
        ]
    )


# (6) ------------------------------------------------------------------------------------------


def cross_entropy_gradient(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """(6) dCE/dz = (sum_c u_c) p - u. Rows whose label is out of range count as unlabelled."""
    log_p = log_softmax(logits)
    if not target.is_floating_point():
        labels = torch.arange(log_p.shape[-1], device=target.device)
        target = (target.unsqueeze(-1) == labels).to(log_p.dtype)
        if class_weight is not None:
            # F.cross_entropy weighs the label's share as a whole, the smoothed share per class.
            smooth = label_smoothing / target.shape[-1] * class_weight
            mass = (1.0 - label_smoothing) * class_weight * target + smooth
            return mass.sum(-1, keepdim=True) * log_p.exp() - mass
    mass = target_mass(target.to(log_p.dtype), class_weight, label_smoothing)
    return mass.sum(-1, keepdim=True) * log_p.exp() - mass


def divergence_gradient(
    student: Tensor, teacher: Tensor, divergence: str, beta: float
) -> tuple[Tensor, Tensor]:
    """(6) dD_ij/dl_i and dD_ij/dl_j, up to multiples of q that the softmax Jacobian removes."""
    if divergence == "jsd" and beta in (0.0, 1.0):
        divergence = "reverse_kl" if beta else "forward_kl"
    q_i, q_j = student.exp(), teacher.exp()
    if divergence == "forward_kl":
        return -q_j, weigh(q_j, teacher - student)
    if divergence == "reverse_kl":
        return weigh(q_i, student - teacher), -q_i
    if divergence == "soft_ce":
        return -q_j, -weigh(q_j, student)
    log_m = (beta * q_j + (1.0 - beta) * q_i).clamp_min(torch.finfo(q_i.dtype).tiny).log()
    return (1.0 - beta) * weigh(q_i, student - log_m), beta * weigh(q_j, teacher - log_m)


def softmax_jacobian(gradient: Tensor, log_q: Tensor, temperature: Tensor | float) -> Tensor:
    """(6) dL/dz from g = dL/dl with l = log softmax(z / T): (g - q sum_c g) / T."""
    return (gradient - log_q.exp() * gradient.sum(-1, keepdim=True)) / temperature


def divergence_gradients(
    logits: Sequence[Tensor],
    teacher_logits: Sequence[Tensor],
    temperature: Tensor | float,
    divergence: str,
    beta: float,
    detach_teacher: bool,
    coefficient: Tensor,
    wanted: Sequence[Sequence[bool]],
) -> list[Tensor]:
    """(5), (6) d/dz_k of sum_ij sum_n coefficient[i, j, n] D_ij[n], for every exit k."""
    log_q = [log_softmax(z, temperature) for z in (*logits, *teacher_logits)]
    exits = len(logits)
    totals = [torch.zeros_like(l) for l in log_q[:exits]]
    for i in range(exits):
        for j, weight in enumerate(coefficient[i].unsqueeze(-1)):
            if not wanted[i][j]:
                continue
            of_student, of_teacher = divergence_gradient(log_q[i], log_q[j], divergence, beta)
            totals[i] = totals[i] + weigh(weight, of_student)
            if not detach_teacher and j < exits:
                totals[j] = totals[j] + weigh(weight, of_teacher)
    return [softmax_jacobian(g, l, temperature) for g, l in zip(totals, log_q[:exits], strict=True)]


def feature_distance(features: Sequence[Tensor], detach: bool = True) -> Tensor:
    """(8) ||F_k[n] - F_K[n]||^2 for every exit before the deepest: [K - 1, N]."""
    deepest = features[-1].flatten(1)
    deepest = deepest.to(accumulation_dtype(deepest.dtype))
    deepest = deepest.detach() if detach else deepest
    distances = [(f.flatten(1).to(deepest.dtype) - deepest).square().sum(-1) for f in features[:-1]]
    return torch.stack(distances) if distances else deepest.new_zeros(0, deepest.shape[0])


# (7) ------------------------------------------------------------------------------------------


def statistics(logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(7) lse, confidence, prediction, margin, entropy (nats) and sum_c p^2 of one exit, each [N].

    The lowest index wins ties. The margin of a single class is 1.
    """
    z = logits.to(accumulation_dtype(logits.dtype))
    log_p = F.log_softmax(z, dim=-1)
    p = log_p.exp()
    top = p.topk(min(2, p.shape[-1]), dim=-1).values
    margin = top[:, 0] - top[:, 1] if p.shape[-1] > 1 else top[:, 0]
    entropy = -weigh(p, log_p).sum(-1)
    lse = torch.logsumexp(z, dim=-1)
    return lse, top[:, 0], z.argmax(-1), margin, entropy, p.square().sum(-1)


# (10), (11), (12) -----------------------------------------------------------------------------

# Scores that fire at or below the threshold; all others fire at or above it.
LOW_SCORES = ("entropy", "normalized_entropy")
MEASURES = ("confidence", "margin", *LOW_SCORES, "max_logit", "patience", "score")


def gate_score(logits: Tensor, temperature: Tensor | float, measure: str) -> Tensor:
    """The score [N] of one exit from its logits, with p = softmax(z / T).

    ``confidence`` max p; ``margin`` largest minus second largest p (the confidence for a single
    class); ``entropy`` in nats; ``normalized_entropy`` entropy / log C (the entropy, 0, for a
    single class); ``max_logit`` max z / T.
    """
    classes = logits.shape[-1]
    if measure == "max_logit":
        z = logits.to(accumulation_dtype(logits.dtype))
        return (z / temperature).amax(-1)
    log_p = log_softmax(logits, temperature)
    if measure in LOW_SCORES:
        entropy = -weigh(log_p.exp(), log_p).sum(-1)
        normalized = measure == "normalized_entropy" and classes > 1
        return entropy / math.log(classes) if normalized else entropy
    if measure == "confidence" or classes == 1:
        return log_p.amax(-1).exp()
    first, second = log_p.topk(2, dim=-1).values.exp().unbind(-1)
    return first - second


def agreement(prediction: Tensor, previous: Tensor | None, streak: Tensor | None) -> Tensor:
    """``patience``: how many exits in a row answered as the one before them; 0 at the first."""
    if previous is None or streak is None:
        return torch.zeros_like(prediction)
    return torch.where(prediction == previous, streak + 1, torch.zeros_like(streak))


def fires(score: Tensor, threshold: Tensor | float, measure: str) -> Tensor:
    """(10) Whether a row leaves here. A NaN score stays."""
    return score <= threshold if measure in LOW_SCORES else score >= threshold


def partition(stays: Tensor) -> tuple[Tensor, Tensor]:
    """(11) The indices of the rows that stay in order, then of the others; and how many stay.

    Its sizes do not depend on the answer, so nothing waits for a device.
    """
    count = stays.sum()
    staying, leaving = stays.cumsum(0) - 1, count + (~stays).cumsum(0) - 1
    rows = torch.arange(stays.shape[0], device=stays.device)
    place = torch.where(stays, staying, leaving)
    return torch.empty_like(rows).scatter(0, place, rows), count


def first_fire(fired: Tensor) -> Tensor:
    """(10) The exit [N] at which each row leaves, from [K, N] flags; the last always fires."""
    last = torch.ones_like(fired[:1])
    return torch.cat([fired[:-1], last]).to(torch.uint8).argmax(0)


def row_format(x: Tensor) -> torch.memory_format:
    """The memory format in which gathered rows are handed out: that of x."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if last is None or x.is_contiguous() or not x.is_contiguous(memory_format=last):
        return torch.contiguous_format
    return last


def scatter_rows(out: Tensor, values: Tensor, index: Tensor, count: Tensor) -> Tensor:
    """(12) out with out[index[i]] = values[i] for i < count: the others fall beside it."""
    used = torch.arange(index.shape[0], device=index.device) < count
    place = torch.where(used, index, out.shape[0])
    beside = torch.cat([out, out.new_empty((1, *out.shape[1:]))])
    return beside.index_copy(0, place, values)[:-1]

# SPDX-License-Identifier: Apache-2.0
"""The loss family: `multi_exit_loss` and `multi_exit_row_losses`; formulas in reference.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from msdkern import autograd, executors, reference
from msdkern.executors.arguments import LossArguments
from msdkern.ops import checks, library

LossInput = Tensor | Sequence[Tensor]
PAIRS = ("mutual", "last", "deeper", "next")


class MultiExitLoss(NamedTuple):
    """What `multi_exit_loss` returns. Only `loss` carries a gradient."""

    loss: Tensor
    cross_entropy: Tensor
    divergence: Tensor
    pair_divergence: Tensor | None
    prediction: Tensor
    confidence: Tensor


class RowLosses(NamedTuple):
    """What `multi_exit_row_losses` returns: two differentiable [K, N] tensors."""

    cross_entropy: Tensor
    divergence: Tensor


def multi_exit_loss(
    logits: LossInput,
    target: Tensor | None = None,
    *,
    exit_weight: Tensor | Sequence[float] | None = None,
    pair_weight: str | Tensor | None = None,
    pair_scale: float | Tensor = 1.0,
    teacher_logits: Sequence[Tensor] | None = None,
    temperature: float | Tensor = 1.0,
    temperature_squared: bool = True,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    detach_teacher: bool = True,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    pair_divergence: bool = False,
) -> MultiExitLoss:
    """Cross entropy of every exit plus a weighted divergence between exits, in one pass.

    Formula (numbers as in msdkern/reference.py, q = softmax(z / T), s = pair_scale T^2)::

        L = sum_k sum_n r_n a_k[n] CE_k[n] + s sum_ij sum_n r_n W_ij[n] D_ij[n]            (3)

    r_n is 1 / (valid rows) for ``reduction="mean"`` (with class weights the CE part divides by
    the summed weights of the labels, as `torch.nn.functional.cross_entropy` does), 1 for
    ``"sum"``, and 1 / normalizer whenever a normalizer is given.

    Args:
        logits: K tensors [N, C], shallow to deep, or one [K, N, C]; 1 <= K <= 32; float32,
            bfloat16, float16 or float64; any row stride. Never written to.
        target: int64 [N] class indices, float [N, C] class probabilities, or None: no CE.
        exit_weight: a, [K] or [K, N]; default ones.
        pair_weight: W, who teaches whom. "mutual" (all others, 1 / (K - 1)), "last" (the deepest
            teaches all), "deeper" (every deeper exit, mean), "next" (the next deeper one): O(K)
            work. Or a tensor [K, K + E] or [K, K + E, N], row = student, column = teacher,
            external teachers last. None: no divergence.
        pair_scale: multiplies the divergence part; a float or a 0-d tensor.
        teacher_logits: E external teachers [N, C]. They never receive a gradient.
        temperature: T > 0, a float or a 0-d tensor. A new value recompiles nothing.
        temperature_squared: include the factor T^2 in s (Hinton et al., 1503.02531).
        divergence: "forward_kl" KL(q_j || q_i), "reverse_kl" KL(q_i || q_j), "jsd"
            (generalised, with ``beta``), "soft_ce" -sum_c q_j log q_i, for student i, teacher j.
        beta: weight of the teacher in the Jensen-Shannon mixture, in [0, 1].
        detach_teacher: if False, exits that teach receive the gradient of teaching as well.
        class_weight, ignore_index, label_smoothing: as in `F.cross_entropy`. An ignored row adds
            nothing to any term, divergences included, and gets a zero gradient.
        reduction: "mean" or "sum".
        normalizer: a number or a 0-d tensor that divides the summed loss instead of the row
            count: pass the global count under gradient accumulation or data parallelism. 0, the
            count where no row is valid anywhere, gives loss 0, as "mean" over no rows does.
        pair_divergence: also return the means of D_ij over valid rows.

    Returns:
        MultiExitLoss(loss, cross_entropy, divergence, pair_divergence, prediction, confidence):
        ``loss`` is a differentiable scalar (float32; float64 for float64 logits). The rest is
        detached: ``cross_entropy`` [K] as `F.cross_entropy(reduction="mean")` gives it,
        ``divergence`` [K] the mean over valid rows of s sum_j W_ij D_ij, ``pair_divergence``
        [K, K + E] means of D_ij or None, ``prediction`` int64 [K, N] and ``confidence`` [K, N]
        of softmax(z). All rows ignored: loss 0, gradient 0.

    Raises:
        ValueError, TypeError: one sentence naming the rule and the value. Labels and a
            temperature held in a tensor are checked where that needs no host synchronisation.
        RuntimeError: for second-order gradients, and for an executor that cannot serve.

    Sources: equation (8) of multi-self-distillation is this with "mutual" weights (Luan et al.,
    1911.09418); msdkern.nn.describe() lists the methods that are settings of it.
    """
    op = "multi_exit_loss"
    z, arguments = _arguments(
        op, logits, target, exit_weight, pair_weight, pair_scale, teacher_logits, temperature,
        temperature_squared, divergence, beta, detach_teacher, class_weight, ignore_index,
        label_smoothing,
    )  # fmt: skip
    checks.choice(op, "reduction", reduction, ("mean", "sum"))
    first = z[0]
    if normalizer is not None:
        checks.count(op, "normalizer", normalizer)
        normalizer = checks.scalar(op, "normalizer", normalizer, first)
    executor = executors.select(op, first.device.type, z, arguments)
    result = autograd.multi_exit_loss(
        z, *arguments, reduction, normalizer, bool(pair_divergence), executor
    )
    loss, cross_entropy, divergences, pairs, prediction, confidence = result
    return MultiExitLoss(
        loss,
        cross_entropy,
        divergences,
        pairs if pair_divergence else None,
        prediction,
        confidence,
    )


def multi_exit_row_losses(
    logits: LossInput,
    target: Tensor | None = None,
    *,
    exit_weight: Tensor | Sequence[float] | None = None,
    pair_weight: str | Tensor | None = None,
    pair_scale: float | Tensor = 1.0,
    teacher_logits: Sequence[Tensor] | None = None,
    temperature: float | Tensor = 1.0,
    temperature_squared: bool = True,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    detach_teacher: bool = True,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> RowLosses:
    """The terms of `multi_exit_loss` per exit and row, for losses that weigh or select rows.

    Returns RowLosses(cross_entropy, divergence), differentiable [K, N] tensors in float32
    (float64 for float64 logits): a_k[n] CE_k[n] and s sum_j W_ij[n] D_ij[n], without any
    normalisation, 0 on ignored rows. Backward saves only the logits and recomputes the
    probabilities, so that any upstream gradient is exact.

    Arguments and errors: as `multi_exit_loss`, less ``reduction``, ``normalizer`` and
    ``pair_divergence``.
    """
    op = "multi_exit_row_losses"
    z, arguments = _arguments(
        op, logits, target, exit_weight, pair_weight, pair_scale, teacher_logits, temperature,
        temperature_squared, divergence, beta, detach_teacher, class_weight, ignore_index,
        label_smoothing,
    )  # fmt: skip
    executor = executors.select(op, z[0].device.type, z, arguments)
    return RowLosses(*autograd.multi_exit_row_losses(z, *arguments, executor))


# Checks ---------------------------------------------------------------------------------------


def _arguments(
    op: str,
    logits: LossInput,
    target: Tensor | None,
    exit_weight: Tensor | Sequence[float] | None,
    pair_weight: str | Tensor | None,
    pair_scale: float | Tensor,
    teacher_logits: Sequence[Tensor] | None,
    temperature: float | Tensor,
    temperature_squared: bool,
    divergence: str,
    beta: float,
    detach_teacher: bool,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
) -> tuple[list[Tensor], LossArguments]:
    """The logits and every other argument, checked."""
    z = checks.exits(op, logits)
    exits, rows, classes = checks.rows_and_classes(op, z)
    first = z[0]
    teachers = _teachers(op, teacher_logits, first, rows, classes)
    _check_target(op, target, first, rows, classes)
    pairs, pair_weight = _pairs(op, pair_weight, first, exits, len(teachers), rows)
    if exit_weight is not None:
        exit_weight = _weight(op, "exit_weight", exit_weight, first, [(exits,), (exits, rows)])
    if class_weight is not None:
        class_weight = _weight(op, "class_weight", class_weight, first, [(classes,)])
    checks.positive(op, "temperature", temperature)
    checks.choice(op, "divergence", divergence, tuple(reference.DIVERGENCES))
    checks.share(op, "beta", beta)
    checks.share(op, "label_smoothing", label_smoothing)
    if not isinstance(ignore_index, int) or not -(2**63) <= ignore_index < 2**63:
        checks.fail(op, "ignore_index must be an integer", ignore_index, TypeError)
    return z, LossArguments(
        teachers,
        target,
        exit_weight,
        pairs,
        pair_weight,
        checks.scalar(op, "pair_scale", pair_scale, first),
        checks.scalar(op, "temperature", temperature, first),
        bool(temperature_squared),
        divergence,
        float(beta),
        bool(detach_teacher),
        class_weight,
        ignore_index,
        float(label_smoothing),
    )


def _teachers(
    op: str, teacher_logits: Sequence[Tensor] | None, first: Tensor, rows: int, classes: int
) -> list[Tensor]:
    if teacher_logits is None:
        return []
    if not isinstance(teacher_logits, (list, tuple)):
        checks.fail(op, "teacher_logits must be a sequence of [N, C] tensors", teacher_logits)
    if len(teacher_logits) > checks.MAX_EXITS:
        rule = f"the number of external teachers must be at most {checks.MAX_EXITS}"
        checks.fail(op, rule, len(teacher_logits))
    for t in teacher_logits:
        checks.no_gradient(op, "teacher_logits", checks.plain(op, "teacher_logits", t))
        if t.shape != (rows, classes) or t.dtype != first.dtype or t.device != first.device:
            rule = f"each of teacher_logits must be {first.dtype} [{rows}, {classes}] on "
            checks.fail(op, f"{rule}{first.device}, like the logits", t)
    return list(teacher_logits)


def _check_target(op: str, target: Tensor | None, first: Tensor, rows: int, classes: int) -> None:
    if target is None:
        return
    checks.no_gradient(op, "target", checks.plain(op, "target", target))
    if target.device != first.device:
        rule = f"target must be on the device of the logits ({first.device})"
        checks.fail(op, rule, str(target.device))
    index = target.dtype == torch.int64 and target.shape == (rows,)
    if not index and not (target.is_floating_point() and target.shape == (rows, classes)):
        rule = f"target must be int64 [N] or float [N, C] with N = {rows} and C = {classes}"
        checks.fail(op, rule, target)


def _weight(
    op: str, name: str, weight: Any, first: Tensor, shapes: Sequence[tuple[int, ...]]
) -> Tensor:
    """A weight of one of the given shapes, in the accumulation dtype."""
    dtype = reference.accumulation_dtype(first.dtype)
    if not isinstance(weight, Tensor):
        try:
            weight = torch.tensor(weight, dtype=dtype, device=first.device)
        except (TypeError, ValueError, RuntimeError):
            checks.fail(op, f"{name} must be a tensor or numbers", weight, TypeError)
    checks.no_gradient(op, name, checks.plain(op, name, weight))
    if weight.shape not in shapes or not weight.is_floating_point():
        expected = " or ".join(str(list(s)) for s in shapes)
        checks.fail(op, f"{name} must be floating point {expected}", weight)
    if weight.device != first.device:
        rule = f"{name} must be on the device of the logits ({first.device})"
        checks.fail(op, rule, str(weight.device))
    return weight.to(dtype).contiguous()


def _pairs(
    op: str, pair_weight: str | Tensor | None, first: Tensor, exits: int, teachers: int, rows: int
) -> tuple[str, Tensor | None]:
    """The kind of pair weights and, for a matrix, the matrix."""
    if pair_weight is None:
        return "none", None
    if isinstance(pair_weight, str):
        checks.choice(op, "pair_weight", pair_weight, PAIRS)
        return pair_weight if exits > 1 else "none", None
    shape = (exits, exits + teachers)
    return "dense", _weight(op, "pair_weight", pair_weight, first, [shape, (*shape, rows)])


# Registration ---------------------------------------------------------------------------------


def _gradient_like(logits: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor]:
    """One contiguous tensor per logits tensor that wants a gradient."""
    return [z.new_empty(z.shape) for z, want in zip(logits, wanted, strict=False) if want]


def _fake_loss(logits: Sequence[Tensor], teacher_logits: Sequence[Tensor], *rest: Any) -> Any:
    pair_divergence, gradient = rest[-3], rest[-2]
    exits, rows, _ = reference.sizes(logits)
    dtype = reference.accumulation_dtype(logits[0].dtype)
    new = logits[0].new_empty
    matrix = (exits, exits + len(teacher_logits)) if pair_divergence else (0,)
    return (
        new((), dtype=dtype),
        new(exits, dtype=dtype),
        new(exits, dtype=dtype),
        new(matrix, dtype=dtype),
        new((exits, rows), dtype=torch.int64),
        new((exits, rows), dtype=dtype),
        _gradient_like(logits, gradient),
    )


def _fake_row_losses(logits: Sequence[Tensor], teacher_logits: Sequence[Tensor], *rest: Any) -> Any:
    exits, rows, _ = reference.sizes(logits)
    dtype = reference.accumulation_dtype(logits[0].dtype)
    return tuple(logits[0].new_empty((exits, rows), dtype=dtype) for _ in range(2))


def _fake_row_losses_backward(
    grad_cross_entropy: Tensor, grad_divergence: Tensor, logits: Any, *rest: Any
) -> list[Tensor]:
    return _gradient_like(logits, rest[-2])


library.register("multi_exit_loss", _fake_loss)
library.register("multi_exit_row_losses", _fake_row_losses)
library.register("multi_exit_row_losses_backward", _fake_row_losses_backward)
library.register("scale_", lambda tensors, factor, executor: None)

# SPDX-License-Identifier: Apache-2.0
"""The gate family: `exit_statistics`, and the gates `exit_gate` and `gate_step`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from msdkern import executors, reference
from msdkern.ops import checks, library


class ExitStatistics(NamedTuple):
    """Statistics of p = softmax(z), each [K, N]; prediction int64, the others floating point."""

    lse: Tensor
    confidence: Tensor
    prediction: Tensor
    margin: Tensor
    entropy: Tensor
    sum_squares: Tensor


def exit_statistics(logits: Tensor | Sequence[Tensor]) -> ExitStatistics:
    """(7) Statistics of every exit and row, in one read of the logits and without a gradient.

    ``lse`` = log sum_c exp z_c, ``confidence`` = max_c p_c, ``prediction`` = argmax (the lowest
    index wins ties), ``margin`` = largest minus second largest p (1 for a single class),
    ``entropy`` = -sum_c p_c log p_c in nats, ``sum_squares`` = sum_c p_c^2.

    Args:
        logits: K tensors [N, C] or one [K, N, C]; float32, bfloat16, float16 or float64.

    Raises: ValueError, TypeError with one sentence.
    """
    op = "exit_statistics"
    z = checks.exits(op, logits)
    checks.rows_and_classes(op, z)
    executor = executors.select(op, z[0].device.type)
    z = [t.detach() for t in z]
    return ExitStatistics(*executors.call("exit_statistics", z, executor))


class ExitDecision(NamedTuple):
    """Which exit answers each row, and what it says: [N] each; index and prediction int64."""

    exit_index: Tensor
    prediction: Tensor
    score: Tensor


class GateStep(NamedTuple):
    """One exit's answers [N], the order `stay` [N] of the rows, and the `count` that stays.

    ``stay[:count]`` are the rows that stay and ``stay[count:]`` the others, both in order.
    """

    prediction: Tensor
    score: Tensor
    stay: Tensor
    count: Tensor  # type: ignore[assignment]


def exit_gate(
    logits: Tensor | Sequence[Tensor],
    threshold: float | Tensor | Sequence[float],
    measure: str = "confidence",
    *,
    temperature: float | Tensor | Sequence[float] = 1.0,
    score: Tensor | None = None,
) -> ExitDecision:
    """(10) The first exit whose score reaches its threshold answers a row; the last always does.

    A gate fires on score >= threshold, for the entropies on score <= threshold; a NaN score stays.
    Once a row has left, its later exits are not read. With p = softmax(z / T) the score is, by
    ``measure``:

    ========================  ====================================================================
    ``confidence``            max_c p_c
    ``margin``                largest minus second largest p (1 for a single class)
    ``entropy``               -sum_c p_c log p_c in nats
    ``normalized_entropy``    entropy / log C, between 0 and 1
    ``max_logit``             max_c z_c / T
    ``patience``              how many exits in a row predicted what the one before them did (PABEE)
    ``score``                 the argument ``score`` [K, N], from a learned gate say
    ========================  ====================================================================

    Args:
        logits: K tensors [N, C] or one [K, N, C]; float32, bfloat16, float16 or float64.
        threshold: one number for all exits, or K; not NaN, +-inf allowed. The last is not used.
            It is rounded to the dtype of the scores before it is compared.
        measure: see above.
        temperature: T > 0 that calibrates p, one number or K.
        score: only for ``measure="score"``: [K, N], floating point.

    Returns:
        ExitDecision: ``exit_index`` (0-based), ``prediction`` (argmax, the lowest index wins
        ties) and ``score`` (float32; float64 for float64) at the exit that answers. No gradient.

    Raises: ValueError, TypeError with one sentence.
    """
    op = "exit_gate"
    z = checks.exits(op, logits)
    exits, rows, _ = checks.rows_and_classes(op, z)
    checks.choice(op, "measure", measure, reference.MEASURES)
    t = checks.per_exit(op, "temperature", temperature, exits, z[0])
    limit = checks.per_exit(op, "threshold", threshold, exits, z[0])
    score = _given(op, measure, score, (exits, rows), z[0])
    executor = executors.select(op, z[0].device.type)
    z = [x.detach() for x in z]
    return ExitDecision(*executors.call("exit_gate", z, limit, measure, t, score, executor))


def gate_step(
    logits: Tensor,
    threshold: float | Tensor,
    measure: str = "confidence",
    *,
    temperature: float | Tensor = 1.0,
    score: Tensor | None = None,
    previous: tuple[Tensor, ...] | None = None,
    live: Tensor | None = None,
) -> GateStep:
    """(11) One exit's gate over the rows in flight: answers, and which rows go on.

    Nothing here waits for a device: ``stay`` always has N entries, and ``count`` stays where the
    logits are. So the step can be captured in a CUDA graph; pass the ``count`` of the exit before
    as ``live`` then, and `compact_rows` keeps every shape.

    Args:
        logits: one exit's [N, C]; float32, bfloat16, float16 or float64.
        threshold, temperature: a number or a 0-d tensor, as in `exit_gate`. A gate that is to
            fire for every row gets -inf (entropies: inf); rows of NaN stay even then.
        measure: as in `exit_gate`.
        score: [N], only for ``measure="score"``.
        previous: for ``measure="patience"``, prediction and score [N] of the exit before, of the
            same rows (a GateStep will do, while no row has left); None at the first exit.
        live: a 0-d int64 tensor: only the first ``live`` rows are in flight. The others get
            prediction -1 and score NaN, and do not stay.

    Returns:
        GateStep: ``prediction`` and ``score`` [N]; ``stay`` int64 [N], a permutation: the rows
        that stay in order, then the others in order; ``count`` int64, 0-d. No gradient.

    Raises: ValueError, TypeError with one sentence.
    """
    op = "gate_step"
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        checks.fail(op, "logits must be a tensor [N, C] of one exit", logits)
    rows = checks.rows_and_classes(op, [logits])[1]
    checks.choice(op, "measure", measure, reference.MEASURES)
    t = checks.per_exit(op, "temperature", temperature, None, logits)
    limit = checks.per_exit(op, "threshold", threshold, None, logits)
    score = _given(op, measure, score, (rows,), logits)
    prediction, streak = _previous(op, measure, previous, rows, logits)
    if live is not None:
        _count(op, "live", live, logits)
    executor = executors.select(op, logits.device.type)
    arguments = (limit, measure, t, score, prediction, streak, live, executor)
    return GateStep(*executors.call("gate_step", logits.detach(), *arguments))


def _given(
    op: str, measure: str, score: object, shape: tuple[int, ...], like: Tensor
) -> Tensor | None:
    if (score is None) != (measure != "score"):
        rule = "score must be given exactly when measure is 'score'"
        checks.fail(op, rule, f"measure {measure!r} and score {checks.describe(score)}")
    if score is None:
        return None
    score = checks.plain(op, "score", score)
    if tuple(score.shape) != shape or not score.is_floating_point():
        checks.fail(op, f"score must be floating point {list(shape)}", score)
    if score.device != like.device:
        checks.fail(op, f"score must be on the device of the logits ({like.device})", score.device)
    return score.detach().to(reference.accumulation_dtype(like.dtype))


def _previous(
    op: str, measure: str, previous: Any, rows: int, like: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    if previous is None:
        return None, None
    if measure != "patience":
        rule = "previous must be None unless measure is 'patience'"
        checks.fail(op, rule, f"measure {measure!r}")
    rule = f"previous must be prediction int64 [{rows}] and score [{rows}] of the exit before"
    if not isinstance(previous, (tuple, list)) or len(previous) < 2:
        checks.fail(op, rule, previous)
    prediction, score = (checks.plain(op, "previous", x) for x in previous[:2])
    good = prediction.dtype == torch.int64 and score.is_floating_point()
    if not good or tuple(prediction.shape) != (rows,) or tuple(score.shape) != (rows,):
        checks.fail(op, rule, [prediction, score])
    if prediction.device != like.device or score.device != like.device:
        rule = f"previous must be on the device of the logits ({like.device})"
        checks.fail(op, rule, f"{prediction.device} and {score.device}")
    return prediction, score.to(reference.accumulation_dtype(like.dtype))


def _count(op: str, name: str, count: object, like: Tensor) -> None:
    """A 0-d int64 tensor that lies where the rows do."""
    if not isinstance(count, Tensor) or count.dim() != 0 or count.dtype != torch.int64:
        checks.fail(op, f"{name} must be a 0-d int64 tensor", count)
    if count.device != like.device:
        checks.fail(op, f"{name} must be on the device of the rows ({like.device})", count.device)


def _fake_statistics(logits: Sequence[Tensor], executor: str) -> tuple[Tensor, ...]:
    first, shape = logits[0], reference.sizes(logits)[:2]
    dtype = reference.accumulation_dtype(first.dtype)
    dtypes = (dtype, dtype, torch.int64, dtype, dtype, dtype)
    return tuple(first.new_empty(shape, dtype=d) for d in dtypes)


library.register("exit_statistics", _fake_statistics)


def _fake_gate(logits: Sequence[Tensor], *arguments: Any) -> tuple[Tensor, ...]:
    first, rows = logits[0], reference.sizes(logits)[1]
    real = reference.accumulation_dtype(first.dtype)
    return tuple(first.new_empty(rows, dtype=d) for d in (torch.int64, torch.int64, real))


def _fake_step(logits: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    rows, real = logits.shape[0], reference.accumulation_dtype(logits.dtype)
    columns = tuple(logits.new_empty(rows, dtype=d) for d in (torch.int64, real, torch.int64))
    return (*columns, logits.new_empty((), dtype=torch.int64))


library.register("exit_gate", _fake_gate)
library.register("gate_step", _fake_step)

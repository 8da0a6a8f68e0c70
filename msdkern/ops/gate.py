# SPDX-License-Identifier: Apache-2.0
"""The gate family: `exit_statistics`, what every gate and calibration reads of the logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

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


def _fake_statistics(logits: Sequence[Tensor], executor: str) -> tuple[Tensor, ...]:
    first, shape = logits[0], reference.sizes(logits)[:2]
    dtype = reference.accumulation_dtype(first.dtype)
    dtypes = (dtype, dtype, torch.int64, dtype, dtype, dtype)
    return tuple(first.new_empty(shape, dtype=d) for d in dtypes)


library.register("exit_statistics", _fake_statistics)

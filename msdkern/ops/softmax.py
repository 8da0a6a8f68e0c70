# SPDX-License-Identifier: Apache-2.0
"""`multi_exit_softmax`: the softmax of all exits at one temperature, in one call."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from msdkern import autograd, executors
from msdkern.ops import checks, library


def multi_exit_softmax(
    logits: Tensor | Sequence[Tensor], temperature: float | Tensor = 1.0, log: bool = False
) -> tuple[Tensor, ...]:
    """softmax(z_k / T), or its logarithm, for all K exits in one pass.

    Args:
        logits: K tensors [N, C] or one [K, N, C]; float32, bfloat16, float16 or float64.
        temperature: T > 0, a float or a 0-d tensor; receives no gradient.
        log: return log softmax(z_k / T).

    Returns:
        K tensors [N, C] in the dtype of the logits, differentiable with respect to the logits;
        computed in float32 (float64 for float64) and rounded once.

    Raises: ValueError, TypeError with one sentence; RuntimeError for second-order gradients.
    """
    op = "multi_exit_softmax"
    z = checks.exits(op, logits)
    checks.rows_and_classes(op, z)
    checks.positive(op, "temperature", temperature)
    t = checks.scalar(op, "temperature", temperature, z[0])
    executor = executors.select(op, z[0].device.type)
    outputs = autograd.multi_exit_softmax(z, t, bool(log), executor)
    return tuple(outputs[0].unbind(0)) if outputs[0].dim() == 3 else tuple(outputs)


library.register(
    "multi_exit_softmax",
    lambda logits, temperature, log, executor: [z.new_empty(z.shape) for z in logits],
)
library.register(
    "multi_exit_softmax_backward",
    lambda gradients, outputs, temperature, log, executor: [y.new_empty(y.shape) for y in outputs],
)

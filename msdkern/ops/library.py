# SPDX-License-Identifier: Apache-2.0
"""The registered ops: every schema in one table, each with its fake and its executors.

An op takes and returns plain tensors, and its last argument names the executor, so that the
choice made in forward is the one that backward uses. Scalars that may change from step to step
(temperature, scale, normalizer) are 0-d tensors: a new value recompiles nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from msdkern import executors

# `logits` is K tensors [N, C], or one tensor [K, N, C]. `gradient` has one flag per tensor in
# `logits`; empty means that no gradient is wanted.
_LOSS_INPUTS = """
    Tensor[] logits, Tensor[] teacher_logits, Tensor? target, Tensor? exit_weight, str pairs,
    Tensor? pair_weight, Tensor pair_scale, Tensor temperature, bool temperature_squared,
    str divergence, float beta, bool detach_teacher, Tensor? class_weight, int ignore_index,
    float label_smoothing"""

SCHEMAS = {
    "multi_exit_loss": f"""({_LOSS_INPUTS}, str reduction, Tensor? normalizer,
        bool pair_divergence, bool[] gradient, str executor)
        -> (Tensor loss, Tensor cross_entropy, Tensor divergence, Tensor pair_divergence,
            Tensor prediction, Tensor confidence, Tensor[] gradients)""",
    "multi_exit_row_losses": f"""({_LOSS_INPUTS}, str executor)
        -> (Tensor cross_entropy, Tensor divergence)""",
    "multi_exit_row_losses_backward": f"""(Tensor grad_cross_entropy, Tensor grad_divergence,
        {_LOSS_INPUTS}, bool[] gradient, str executor) -> Tensor[]""",
    "multi_exit_softmax": """(Tensor[] logits, Tensor temperature, bool log, str executor)
        -> Tensor[]""",
    "multi_exit_softmax_backward": """(Tensor[] gradients, Tensor[] outputs, Tensor temperature,
        bool log, str executor) -> Tensor[]""",
    "exit_statistics": """(Tensor[] logits, str executor) -> (Tensor lse, Tensor confidence,
        Tensor prediction, Tensor margin, Tensor entropy, Tensor sum_squares)""",
    "exit_gate": """(Tensor[] logits, Tensor threshold, str measure, Tensor temperature,
        Tensor? score, str executor) -> (Tensor exit_index, Tensor prediction, Tensor score)""",
    "gate_step": """(Tensor logits, Tensor threshold, str measure, Tensor temperature,
        Tensor? score, Tensor? previous_prediction, Tensor? previous_score, Tensor? live,
        str executor) -> (Tensor prediction, Tensor score, Tensor stay, Tensor count)""",
    "compact_rows": """(Tensor[] x, Tensor stay, Tensor? count, SymInt capacity, str executor)
        -> Tensor[]""",
    "scatter_rows": """(Tensor(a!)[] out, Tensor[] values, Tensor index, Tensor? count,
        str executor) -> ()""",
    "scale_": "(Tensor(a!)[] tensors, Tensor factor, str executor) -> ()",
}

_LIBRARY = torch.library.Library("msdkern", "DEF")


def _dispatch(name: str) -> Callable[..., Any]:
    def run(*arguments: Any) -> Any:
        return executors.implementation(name, arguments[-1])(*arguments[:-1])

    return run


def register(name: str, fake: Callable[..., Any]) -> Any:
    """Define msdkern::name, attach its executors and its fake, and return the callable op."""
    _LIBRARY.define(name + " ".join(SCHEMAS[name].split()))
    _LIBRARY.impl(name, _dispatch(name), "CompositeExplicitAutograd")
    torch.library.register_fake(f"msdkern::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.msdkern, name).default

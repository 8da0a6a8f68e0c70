# SPDX-License-Identifier: Apache-2.0
"""msdkern: one pass over the logits of a multi-exit network.

Losses, gradients and exit statistics of K exits at once, on the CPU (C++) and wherever PyTorch
runs. Start with `multi_exit_loss` and `msdkern.nn.MSDLoss`; `explain()` says who computes.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from msdkern import calibrate, executors, infer, models, nn, pairs
    from msdkern.executors import executor, explain
    from msdkern.ops import (
        ExitDecision,
        ExitStatistics,
        GateStep,
        MultiExitLoss,
        RowLosses,
        compact_rows,
        exit_gate,
        exit_statistics,
        gate_step,
        multi_exit_loss,
        multi_exit_row_losses,
        multi_exit_softmax,
        scatter_rows,
    )

# Loaded when first asked for, so that `msdkern --help` answers without loading PyTorch.
_HOME = {
    "ExitDecision": "msdkern.ops",
    "ExitStatistics": "msdkern.ops",
    "GateStep": "msdkern.ops",
    "MultiExitLoss": "msdkern.ops",
    "RowLosses": "msdkern.ops",
    "compact_rows": "msdkern.ops",
    "executor": "msdkern.executors",
    "exit_gate": "msdkern.ops",
    "exit_statistics": "msdkern.ops",
    "explain": "msdkern.executors",
    "gate_step": "msdkern.ops",
    "multi_exit_loss": "msdkern.ops",
    "multi_exit_row_losses": "msdkern.ops",
    "multi_exit_softmax": "msdkern.ops",
    "scatter_rows": "msdkern.ops",
}
_SUBMODULES = ("calibrate", "executors", "infer", "models", "nn", "pairs")

__all__ = [
    "ExitDecision",
    "ExitStatistics",
    "GateStep",
    "MultiExitLoss",
    "RowLosses",
    "__version__",
    "calibrate",
    "compact_rows",
    "executor",
    "executors",
    "exit_gate",
    "exit_statistics",
    "explain",
    "gate_step",
    "infer",
    "models",
    "multi_exit_loss",
    "multi_exit_row_losses",
    "multi_exit_softmax",
    "nn",
    "pairs",
    "scatter_rows",
]


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"msdkern.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'msdkern' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOME[name]), name)
    return value

# SPDX-License-Identifier: Apache-2.0
"""The contract: schemas, checks, fakes and docstrings of the public ops, one file per family."""

from msdkern.ops.compact import compact_rows, scatter_rows
from msdkern.ops.gate import (
    ExitDecision,
    ExitStatistics,
    GateStep,
    exit_gate,
    exit_statistics,
    gate_step,
)
from msdkern.ops.loss import MultiExitLoss, RowLosses, multi_exit_loss, multi_exit_row_losses
from msdkern.ops.softmax import multi_exit_softmax

__all__ = [
    "ExitDecision",
    "ExitStatistics",
    "GateStep",
    "MultiExitLoss",
    "RowLosses",
    "compact_rows",
    "exit_gate",
    "exit_statistics",
    "gate_step",
    "multi_exit_loss",
    "multi_exit_row_losses",
    "multi_exit_softmax",
    "scatter_rows",
]

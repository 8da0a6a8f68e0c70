# SPDX-License-Identifier: Apache-2.0
"""The contract: schemas, checks, fakes and docstrings of the public ops, one file per family."""

from msdkern.ops.gate import ExitStatistics, exit_statistics
from msdkern.ops.loss import MultiExitLoss, RowLosses, multi_exit_loss, multi_exit_row_losses
from msdkern.ops.softmax import multi_exit_softmax

__all__ = [
    "ExitStatistics",
    "MultiExitLoss",
    "RowLosses",
    "exit_statistics",
    "multi_exit_loss",
    "multi_exit_row_losses",
    "multi_exit_softmax",
]

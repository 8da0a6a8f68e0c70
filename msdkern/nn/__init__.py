# SPDX-License-Identifier: Apache-2.0
"""Loss modules: `MSDLoss`, the general `MultiExitLoss`, and published methods by name."""

from __future__ import annotations

from msdkern.nn.dkd import DKDLoss
from msdkern.nn.features import feature_loss
from msdkern.nn.losses import MSDLoss, MultiExitLoss
from msdkern.nn.presets import create, describe, names

__all__ = [
    "DKDLoss",
    "MSDLoss",
    "MultiExitLoss",
    "create",
    "describe",
    "feature_loss",
    "names",
]

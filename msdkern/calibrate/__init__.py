# SPDX-License-Identifier: Apache-2.0
"""What a held-out set says of the exits: thresholds, temperatures, how calibrated they are."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from msdkern.calibrate.files import Thresholds, load, model_fingerprint, save
    from msdkern.calibrate.match import Match, match_accuracy
    from msdkern.calibrate.metrics import (
        Bins,
        brier_score,
        expected_calibration_error,
        negative_log_likelihood,
        reliability,
    )
    from msdkern.calibrate.risk import RiskControl, risk_controlled_thresholds
    from msdkern.calibrate.solve import maximize_accuracy
    from msdkern.calibrate.temperature import fit_temperature
    from msdkern.calibrate.thresholds import (
        DISABLED,
        Outcome,
        budgeted_thresholds,
        exit_scores,
        geometric_fractions,
        outcome,
    )

# Loaded when first asked for, so that `msdkern calibrate --help` answers without loading PyTorch.
_HOME = {
    "Bins": "metrics",
    "DISABLED": "thresholds",
    "Match": "match",
    "Outcome": "thresholds",
    "RiskControl": "risk",
    "Thresholds": "files",
    "brier_score": "metrics",
    "budgeted_thresholds": "thresholds",
    "exit_scores": "thresholds",
    "expected_calibration_error": "metrics",
    "fit_temperature": "temperature",
    "geometric_fractions": "thresholds",
    "load": "files",
    "match_accuracy": "match",
    "maximize_accuracy": "solve",
    "model_fingerprint": "files",
    "negative_log_likelihood": "metrics",
    "outcome": "thresholds",
    "reliability": "metrics",
    "risk_controlled_thresholds": "risk",
    "save": "files",
}

__all__ = [
    "DISABLED",
    "Bins",
    "Match",
    "Outcome",
    "RiskControl",
    "Thresholds",
    "brier_score",
    "budgeted_thresholds",
    "exit_scores",
    "expected_calibration_error",
    "fit_temperature",
    "geometric_fractions",
    "load",
    "match_accuracy",
    "maximize_accuracy",
    "model_fingerprint",
    "negative_log_likelihood",
    "outcome",
    "reliability",
    "risk_controlled_thresholds",
    "save",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'msdkern.calibrate' has no attribute {name!r}")
    return getattr(importlib.import_module(f"msdkern.calibrate.{_HOME[name]}"), name)

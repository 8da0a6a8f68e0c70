# SPDX-License-Identifier: Apache-2.0
"""Leaving early for real: rows that are sure enough stop, and the work on them with them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from msdkern.infer.answers import Answers, Report
    from msdkern.infer.anytime import AnytimeRunner
    from msdkern.infer.budgeted import AdaptiveRunner
    from msdkern.infer.export import (
        BatchOneExport,
        CompactingExport,
        export_aot,
        export_onnx,
        export_program,
    )
    from msdkern.infer.stream import Stream

# Loaded when first asked for, so that `msdkern export --help` answers without loading PyTorch.
_HOME = {
    "AdaptiveRunner": "budgeted",
    "Answers": "answers",
    "AnytimeRunner": "anytime",
    "BatchOneExport": "export",
    "CompactingExport": "export",
    "Report": "answers",
    "Stream": "stream",
    "export_aot": "export",
    "export_onnx": "export",
    "export_program": "export",
}

__all__ = [
    "AdaptiveRunner",
    "Answers",
    "AnytimeRunner",
    "BatchOneExport",
    "CompactingExport",
    "Report",
    "Stream",
    "export_aot",
    "export_onnx",
    "export_program",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'msdkern.infer' has no attribute {name!r}")
    return getattr(importlib.import_module(f"msdkern.infer.{_HOME[name]}"), name)

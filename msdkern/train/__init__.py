# SPDX-License-Identifier: Apache-2.0
"""Training: ``fit(TrainConfig(out=...))`` is what ``msdkern train`` calls."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from msdkern.train.config import TrainConfig
    from msdkern.train.loop import fit

__all__ = ["TrainConfig", "fit"]


def __getattr__(name: str) -> Any:
    # Lazy, so that `msdkern train --help` answers without loading PyTorch.
    if name == "fit":
        from msdkern.train.loop import fit

        return fit
    if name == "TrainConfig":
        from msdkern.train.config import TrainConfig

        return TrainConfig
    raise AttributeError(f"module 'msdkern.train' has no attribute {name!r}")

# SPDX-License-Identifier: Apache-2.0
"""Executor `triton`: losses and gates on any GPU that Triton reaches, without a compiler installed.

It runs on the current stream, allocates only through PyTorch, never waits for the device, and may
be captured into a CUDA graph. What would need the host to read device memory is therefore not
raised: a row whose label is out of range, and everything under a temperature or normalizer in a
device tensor that is not positive, becomes NaN, and nothing is read out of bounds. A gate whose
temperature or threshold is no such number lets no row leave, and a row that does not exist is zero
where it is gathered and written nowhere.
MSDKERN_CHECK=1 in the environment checks these values on the host instead, at the price of a
synchronisation per call.

With TRITON_INTERPRET=1 set before the first use, Triton interprets the kernels and they serve CPU
tensors: slow, for tests.
"""

from __future__ import annotations

import functools
import importlib
import os
from typing import Any

OLDEST = (3, 6)


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def device_type() -> str:
    """What it serves: CUDA and ROCm tensors; those of the CPU in Triton's interpreter."""
    return "cpu" if interpreted() else "cuda"


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2] if part.isdigit())


@functools.cache
def reason() -> str | None:
    try:
        triton = importlib.import_module("triton")
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    if _version(triton.__version__) < OLDEST:
        wanted = ".".join(map(str, OLDEST))
        return f"Triton {wanted} or newer is needed; this is {triton.__version__}"
    if interpreted():
        return None
    import torch

    if not torch.cuda.is_available():
        return f"Triton {triton.__version__} is there, but PyTorch finds no GPU"
    major, minor = torch.cuda.get_device_capability()
    if torch.version.hip is None and major < 8:
        return f"Triton's kernels need compute capability 8.0; this GPU has {major}.{minor}"
    return None


def _op(name: str, module: str = "launch") -> Any:
    def call(*arguments: Any) -> Any:
        # Kernels are declared, and Triton imported, by the first call.
        return getattr(importlib.import_module(f"{__name__}.{module}"), name)(*arguments)

    call.__name__ = name
    return call


multi_exit_loss = _op("multi_exit_loss")
multi_exit_row_losses = _op("multi_exit_row_losses")
multi_exit_row_losses_backward = _op("multi_exit_row_losses_backward")
multi_exit_softmax = _op("multi_exit_softmax")
multi_exit_softmax_backward = _op("multi_exit_softmax_backward")
exit_statistics = _op("exit_statistics")
scale_ = _op("scale_")
exit_gate = _op("exit_gate", "gate_launch")
gate_step = _op("gate_step", "gate_launch")
compact_rows = _op("compact_rows", "gate_launch")
scatter_rows = _op("scatter_rows", "gate_launch")

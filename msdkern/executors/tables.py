# SPDX-License-Identifier: Apache-2.0
"""What native kernels are called with: pointer tables and dtype codes. The only file that reads
the addresses of tensors.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

ABI_VERSION = 4
DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}


def load_module(name: str) -> tuple[Any, str | None]:
    """A native module that has this package's ABI, or None and why there is none."""
    try:
        module = importlib.import_module(f"msdkern.{name}")
    except ImportError as error:
        return None, f"the native module msdkern.{name} is not there ({error})"
    if module.abi_version != ABI_VERSION:
        return None, (
            f"msdkern.{name} has ABI version {module.abi_version}, this package needs "
            f"{ABI_VERSION}: install again"
        )
    return module, None


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def unit_columns(tensor: Tensor) -> Tensor:
    """The tensor itself, or a copy where neighbouring classes are not neighbours in memory."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def table(tensors: Sequence[Tensor]) -> tuple[list[int], list[int]]:
    """Address and row stride of every exit, for K tensors [N, C] or one [K, N, C]."""
    first = tensors[0]
    if first.dim() == 3:
        step, row, _ = first.stride()
        step *= first.element_size()
        start = first.data_ptr()
        return [start + k * step for k in range(first.shape[0])], [row] * first.shape[0]
    return [t.data_ptr() for t in tensors], [t.stride(0) for t in tensors]


def gradient_table(
    logits: Sequence[Tensor], wanted: Sequence[bool]
) -> tuple[list[Tensor], list[int]]:
    """Fresh contiguous gradients, and the address of each exit's (0 where none is wanted)."""
    if not any(wanted):
        return [], []
    fresh = [
        torch.empty_like(z, memory_format=torch.contiguous_format) if want else None
        for z, want in zip(logits, wanted, strict=True)
    ]
    kept = [g for g in fresh if g is not None]
    if kept[0].dim() == 3:
        return kept, table(kept)[0]
    return kept, [address(g) for g in fresh]


def real(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype).contiguous()

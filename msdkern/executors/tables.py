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


def table(tensors: Sequence[Tensor]) -> tuple[list[int], list[int], list[Tensor]]:
    """Address and row stride of every exit, for K tensors [N, C] or one [K, N, C]; and copies of
    those whose neighbouring classes are no neighbours in memory, which must live until the kernel
    has returned.
    """
    if tensors[0].dim() == 3:
        tensors = tensors[0].unbind()
    addresses, strides, copies = [], [], []
    for t in tensors:
        row, column = t.stride()
        if column != 1 and t.shape[1] != 1:
            t = t.contiguous()
            row = t.stride(0)
            copies.append(t)
        addresses.append(t.data_ptr())
        strides.append(row)
    return addresses, strides, copies


def gradient_table(
    logits: Sequence[Tensor], wanted: Sequence[bool]
) -> tuple[list[Tensor], list[int]]:
    """Fresh contiguous gradients, and the address of each exit's (0 where none is wanted)."""
    if not any(wanted):
        return [], []
    gradients: list[Tensor] = []
    addresses = []
    for z, want in zip(logits, wanted, strict=True):
        if not want:
            addresses.append(0)
            continue
        # All are alike; a memory format costs a quarter of an allocation to ask for.
        if gradients:
            gradient = torch.empty_like(gradients[0])
        else:
            gradient = torch.empty_like(z, memory_format=torch.contiguous_format)
        gradients.append(gradient)
        addresses.append(gradient.data_ptr())
    return gradients, table(gradients)[0] if gradients[0].dim() == 3 else addresses


def real(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype).contiguous()

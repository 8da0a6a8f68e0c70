# SPDX-License-Identifier: Apache-2.0
"""Executor `cuda`: the CUDA kernels, in the order of PyTorch's current stream.

The calls are those of executors/native.py; this file says where they run. Nothing waits for the
device and nothing on it is read: numbers held in tensors there stay there. A label out of range
therefore cannot raise. It makes its row's terms and gradient NaN, and with them the loss, and is
remembered: `check_labels` waits for the device and raises. So does `check_indices` for rows that
do not exist: `compact_rows` fills them with zeros, `scatter_rows` leaves them out. A temperature
of a gate that is not positive makes its scores NaN, and a threshold that is NaN lets no row leave.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from msdkern import reference
from msdkern.executors import native, tables

BAD_LABEL, BAD_INDEX = 1, 6  # indices of the flags among the workspace's 32-bit words
FLAGS = 64  # bytes at its beginning that hold them
CUDA_ERROR = 7


@functools.cache
def _load() -> tuple[Any, str | None]:
    return tables.load_module("_cuda")


def _device_reason(report: dict[str, Any]) -> str | None:
    """Why none of the computer's devices can run the kernels, or None."""
    if report["status"] != "ok":
        return f"CUDA says: {report['status']}"
    if any(device["status"] == "ok" for device in report["devices"]):
        return None
    found = "; ".join(f"{d['name']}: {d['status']}" for d in report["devices"])
    return f"no device runs the kernels that msdkern._cuda has ({found})"


def reason() -> str | None:
    module, why = _load()
    if why is not None:
        return why
    if torch.version.cuda is None:
        return "this PyTorch is built without CUDA"
    return _device_reason(module.device_report())


class _Cuda(native.Machine):
    def __init__(self) -> None:
        # By device, stream and thread: a call may be two launches, which no other may part.
        self.workspaces: dict[tuple[int, int, int], Tensor] = {}

    def kernels(self) -> Any:
        return _load()[0]

    def device(self, like: Tensor) -> torch.device:
        return like.device

    def number(self, value: Tensor, dtype: torch.dtype) -> tuple[float, Tensor | None]:
        if value.device.type == "cpu":
            return float(value.item()), None
        return 1.0, value.to(reference.accumulation_dtype(dtype))

    def numbers(self, value: Tensor, dtype: torch.dtype) -> tuple[list[float], Tensor | None]:
        if value.device.type == "cpu":
            return value.view(-1).tolist(), None
        there = value.to(reference.accumulation_dtype(dtype)).contiguous()
        return [1.0] * value.numel(), there

    def count(self, value: Tensor | None, otherwise: int) -> tuple[int, Tensor | None]:
        return (otherwise, None) if value is None else (0, value)

    def stream(self, device: torch.device) -> int:
        return torch.cuda.current_stream(device).cuda_stream

    def capturing(self) -> bool:
        """Whether the stream records a graph: memory of the graph must not outlive it here."""
        return torch.cuda.is_current_stream_capturing()

    @functools.cache  # noqa: B019 (one instance, which lives as long as the process)
    def workspace_bytes(self, index: int, exits: int, teachers: int) -> int:
        return self.kernels().workspace(index, exits, teachers)

    def workspace(self, device: torch.device, stream: int, exits: int, teachers: int) -> Tensor:
        """Zeros, or what the last call in this stream left, which is as good."""
        index = device.index or 0
        size = self.workspace_bytes(index, exits, teachers)
        if self.capturing():
            return torch.zeros(size, dtype=torch.uint8, device=device)
        key = index, stream, threading.get_ident()
        kept = self.workspaces.get(key)
        if kept is None or kept.numel() < size:
            grown = torch.zeros(size, dtype=torch.uint8, device=device)
            if kept is not None:
                grown[:FLAGS].copy_(kept[:FLAGS])  # nobody has asked for them yet
            self.workspaces[key] = kept = grown
        return kept

    def place(
        self, like: Tensor, exits: int, teachers: int, scalars: Sequence[Tensor | None]
    ) -> Any:
        device = like.device
        stream = self.stream(device)
        memory = self.workspace(device, stream, exits, teachers)
        there = [tables.address(s) for s in scalars]
        return device.index or 0, stream, tables.address(memory), there

    def fail(self, op: str, status: int) -> None:
        if status == CUDA_ERROR:
            raise RuntimeError(f"{op}: CUDA says: {self.kernels().last_error()}")

    def _met(self, flag: int) -> bool:
        """Whether a flag is up in any workspace; it is put down. Waits for all streams."""
        self.wait()
        flags = [w[:FLAGS].view(torch.int32)[flag] for w in self.workspaces.values()]
        met = [flag.item() for flag in flags]
        for one in flags:
            one.zero_()
        self.wait()
        return any(met)

    def wait(self) -> None:
        for index in {key[0] for key in self.workspaces}:
            torch.cuda.synchronize(index)

    def check_labels(self) -> None:
        """Raise ValueError if a call since the last check met a label that is out of range.

        Waits for the device. Calls recorded in a CUDA graph are not covered: their loss is NaN.
        """
        if self._met(BAD_LABEL):
            rule = "labels must be in [0, C) or ignore_index"
            raise ValueError(f"multi_exit_loss: {rule}; got one that is out of range on a GPU")

    def check_indices(self) -> None:
        """Raise ValueError if `compact_rows` or `scatter_rows` met a row that does not exist.

        Since the last check. Waits for the device. Calls recorded in a CUDA graph are not covered.
        """
        if self._met(BAD_INDEX):
            rule = "rows must be those of the tensors"
            raise ValueError(f"compact_rows, scatter_rows: {rule}; got one that does not exist")


_cuda = _Cuda()
check_labels = _cuda.check_labels
check_indices = _cuda.check_indices
multi_exit_loss = _cuda.multi_exit_loss
multi_exit_row_losses = _cuda.multi_exit_row_losses
multi_exit_row_losses_backward = _cuda.multi_exit_row_losses_backward
multi_exit_softmax = _cuda.multi_exit_softmax
multi_exit_softmax_backward = _cuda.multi_exit_softmax_backward
exit_statistics = _cuda.exit_statistics
exit_gate = _cuda.exit_gate
gate_step = _cuda.gate_step
compact_rows = _cuda.compact_rows
scatter_rows = _cuda.scatter_rows
scale_ = _cuda.scale_

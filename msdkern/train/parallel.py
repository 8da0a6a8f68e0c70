# SPDX-License-Identifier: Apache-2.0
"""The processes of one run, as torchrun starts them, and what they decide and share.

A batch is that of the whole run, so the number of processes changes neither the steps nor the
learning rate, and a run may be resumed with another number. Without torchrun nothing here does
anything. Who computes what is in engines.py and pipeline.py.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from msdkern.cli import CommandError

T = TypeVar("T")


def size() -> int:
    """Processes of the run."""
    return dist.get_world_size() if _joined() else 1


def rank() -> int:
    """Number of this process; process 0 writes the files and speaks."""
    return dist.get_rank() if _joined() else 0


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()


@contextlib.contextmanager
def process_group(device: str) -> Iterator[None]:
    """Joins the processes that torchrun started: gloo on CPUs, NCCL on GPUs."""
    if _joined() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if gpu:
        torch.cuda.set_device(local_device())
    store, number, count = next(dist.rendezvous("env://"))
    # torchrun keeps one store over restarts: the addresses of processes that died are still in it.
    store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if gpu else "gloo", store=store, rank=number, world_size=count
    )
    try:
        yield
    finally:
        # Whatever still refers to the group would keep its threads until the interpreter is gone.
        gc.collect()
        dist.destroy_process_group()


def local_device() -> torch.device:
    """The GPU of this process: as many processes as GPUs on every computer.

    Raises ``CommandError`` where there are fewer.
    """
    number, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if number >= count:
        raise CommandError(
            f"--device: process {number} of this computer needs a GPU of its own; got {count}"
            " (start fewer processes, or pass --device cpu)"
        )
    return torch.device("cuda", number)


# Deciding together ----------------------------------------------------------------------------


def together(act: Callable[[], T]) -> T:
    """``act()`` in every process; a mistake that one of them finds stops all of them."""
    if size() == 1:
        return act()
    result, error = None, None
    try:
        result = act()
    except CommandError as found:
        error = str(found)
    except OSError as found:
        error = ": ".join(str(part) for part in (found.filename, found.strerror or found) if part)
    errors = [text for text in gathered(error) if text]
    if errors:
        raise agreed(errors[0])
    return result  # type: ignore[return-value]


def first(act: Callable[[], T]) -> T:
    """``act()`` in process 0, and its result everywhere."""
    if size() == 1:
        return act()
    box = [together(lambda: act() if rank() == 0 else None)]
    dist.broadcast_object_list(box, 0)
    return box[0]  # type: ignore[return-value]


def gathered(value: T) -> list[T]:
    """The values of all processes, in each of them."""
    values: list[Any] = [value] * size()
    if size() > 1:
        dist.all_gather_object(values, value)
    return values


def agreed(text: str) -> CommandError:
    """A mistake that all processes stop at, and that process 0 tells."""
    error = CommandError(text)
    error.told = rank() > 0
    return error


# Sharing the work -----------------------------------------------------------------------------


def copies(mode: str) -> int:
    """Processes that share the rows of a batch: all; in a pipeline every row visits all of them."""
    return 1 if mode == "pipeline" else size()


def part(rows: Tensor, count: int, dim: int = 0) -> Tensor:
    """The rows of this process among ``count``: parts differ by one row at most."""
    return rows.tensor_split(count, dim)[rank()] if count > 1 else rows


def sum_over(values: Tensor) -> Tensor:
    """The sum over all processes, on each of them; ``values`` stay as they are."""
    if size() == 1:
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total


@torch.no_grad()
def average_buffers(model: nn.Module) -> None:
    """Running statistics become the mean over the processes."""
    if size() > 1:
        for buffer in model.buffers():
            if buffer.is_floating_point():
                dist.all_reduce(buffer)
                buffer /= size()

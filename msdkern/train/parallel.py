# SPDX-License-Identifier: Apache-2.0
"""One run on several processes, as torchrun starts them: every process takes a part of each batch.

A batch is that of the whole run, so the number of processes changes neither the steps nor the
learning rate, and a run may be resumed with another number. Batch normalisation sees the rows of
its own process in training, as always under DDP. Without torchrun nothing here does anything.
"""

from __future__ import annotations

import contextlib
import gc
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map

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
    errors: list[Any] = [None] * size()
    dist.all_gather_object(errors, error)
    if any(errors):
        raise agreed(next(text for text in errors if text))
    return result  # type: ignore[return-value]


def first(act: Callable[[], T]) -> T:
    """``act()`` in process 0, and its result everywhere."""
    if size() == 1:
        return act()
    box = [together(lambda: act() if rank() == 0 else None)]
    dist.broadcast_object_list(box, 0)
    return box[0]  # type: ignore[return-value]


def agreed(text: str) -> CommandError:
    """A mistake that all processes stop at, and that process 0 tells."""
    error = CommandError(text)
    error.told = rank() > 0
    return error


# Sharing the work -----------------------------------------------------------------------------


def part(rows: Tensor, dim: int = 0) -> Tensor:
    """The rows of this process: parts differ by one row at most."""
    return rows.tensor_split(size(), dim)[rank()] if size() > 1 else rows


def sum_over(values: Tensor) -> Tensor:
    """The sum over all processes, on each of them; ``values`` stay as they are."""
    if size() == 1:
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total


def data_parallel(model: nn.Module, mode: str) -> nn.Module:
    """The module to call in training: DDP around the model, or the model itself, sharded.

    Every exit is part of every loss, if only with weight zero, so DDP need not look for unused
    parameters. FSDP2 shards each trunk piece and each exit by itself; the logits that come out
    are plain tensors.
    """
    if size() == 1:
        return model
    if mode == "fsdp":
        return shard(model)
    wrapped = nn.parallel.DistributedDataParallel(model)
    # Each process keeps its own running statistics, until `average_buffers`. (An attribute, for
    # the argument's name is another in every release.)
    wrapped.broadcast_buffers = False
    return wrapped


def shard(model: Any) -> nn.Module:
    """`fully_shard` on every trunk piece, every exit, and on what is left."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model.to(memory_format=torch.contiguous_format)  # no other layout can be sharded
    # It warns of writing into what exits return. Nothing here does.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
    mesh = init_device_mesh(next(model.parameters()).device.type, (size(),))
    for stage in model.stages:
        for piece in stage.children():
            fully_shard(piece, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@contextlib.contextmanager
def synchronising(network: Any, last: bool) -> Iterator[None]:
    """Gradients travel in the last backward of a step only."""
    if isinstance(network, nn.parallel.DistributedDataParallel) and not last:
        with network.no_sync():
            yield
        return
    if hasattr(network, "set_requires_gradient_sync"):
        network.set_requires_gradient_sync(last)
    yield


@torch.no_grad()
def average_buffers(model: nn.Module) -> None:
    """Running statistics become the mean over the processes."""
    if size() > 1:
        for buffer in model.buffers():
            if buffer.is_floating_point():
                dist.all_reduce(buffer)
                buffer /= size()


# State ----------------------------------------------------------------------------------------


def whole(state: Any) -> Any:
    """A state dict without shards, in every process; what is whole already stays as it is."""
    return tree_map(lambda value: value.full_tensor() if _sharded(value) else value, state)


def shards(state: Any, like: Any) -> Any:
    """The opposite: each tensor of ``state`` sharded as its namesake in ``like``."""
    from torch.distributed.tensor import distribute_tensor

    return {
        name: distribute_tensor(
            value.to(like[name].device), like[name].device_mesh, like[name].placements
        )
        if _sharded(like[name])
        else value
        for name, value in state.items()
    }


def optimizer_shards(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state of an optimizer, each tensor sharded as its parameter."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    parts = {
        number: shards(values, dict.fromkeys(values, weights[number]))
        for number, values in state["state"].items()
    }
    return {**state, "state": parts}


def _sharded(value: Any) -> bool:
    return hasattr(value, "placements")

# SPDX-License-Identifier: Apache-2.0
"""Who computes a step when every process has the whole network before it: DDP, FSDP2, or nobody.

Each process takes a part of the rows of a batch; batch normalisation sees those rows only, as
always under DDP. The other engine, which cuts the network, is `msdkern.train.pipeline.Pipeline`.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from msdkern.train import parallel
from msdkern.train.config import TrainConfig

if TYPE_CHECKING:
    from msdkern.models import MultiExitNetwork
    from msdkern.nn import MultiExitLoss

# Told of every piece of a batch: its loss, logits and labels.
Seen = Callable[[Tensor, list[Tensor], Tensor], None]


class Engine(Protocol):
    """What the loop asks of either."""

    pieces: int  # losses of a batch in this process
    copies: int  # processes that share the rows of a batch
    sharded: bool  # every process holds and saves a part of the weights
    network: Any  # what this process runs

    def backward(
        self, images: Tensor, labels: Tensor, divisor: dict[str, Any], last: bool, seen: Seen
    ) -> None:
        """Adds the gradient of a batch, the ``last`` of a step or not, and tells of its pieces.

        ``divisor``: further arguments of the criterion. Only then do gradients of data parallel
        processes travel.
        """

    def answer(self, images: Tensor, labels: Tensor) -> tuple[list[Tensor], Tensor] | None:
        """Logits and labels that this process answers for in an evaluation, or None."""

    def settle(self) -> None:
        """Makes the running statistics of all processes one."""


class DataParallel:
    """Every process runs the network on its rows, and the gradients are averaged."""

    pieces = 1

    def __init__(
        self,
        model: MultiExitNetwork,
        criterion: MultiExitLoss,
        config: TrainConfig,
        device: torch.device,
        input_shape: tuple[int, ...],
    ) -> None:
        self.copies = parallel.size()
        self.sharded = config.parallel == "fsdp" and self.copies > 1
        self.model, self.criterion, self.device = model, criterion, device
        self.amp = config.amp
        place(model, device, config)
        if config.recompute:
            recompute(model)
        self.module = distribute(model, config)
        # Compiled, the network keeps one set of weights: evaluation uses the plain module.
        whole = config.compile and not self.sharded
        self.network = torch.compile(self.module) if whole else self.module

    def backward(
        self, images: Tensor, labels: Tensor, divisor: dict[str, Any], last: bool, seen: Seen
    ) -> None:
        """See `Engine`. Gradients travel with the last batch of a step only."""
        with synchronising(self.module, last):
            loss, logits = self.forward(images, labels, divisor)
            (loss * self.copies if self.copies > 1 else loss).backward()
        seen(loss.detach(), logits, labels)

    def forward(
        self, images: Tensor, labels: Tensor, divisor: dict[str, Any]
    ) -> tuple[Tensor, list[Tensor]]:
        """Loss and logits of the rows of this process."""
        features = None
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            if self.criterion.needs_features:
                logits, features = self.network(images, features=True)
            else:
                logits = self.network(images)
        return self.criterion(logits, labels, features, **divisor), logits

    def answer(self, images: Tensor, labels: Tensor) -> tuple[list[Tensor], Tensor]:
        """See `Engine`: the rows of this process."""
        images, labels = (parallel.part(rows, self.copies) for rows in (images, labels))
        with torch.compiler.set_stance("force_eager"):
            return self.model(images), labels

    def settle(self) -> None:
        """See `Engine`."""
        parallel.average_buffers(self.model)


def place(module: nn.Module, device: torch.device, config: TrainConfig) -> Any:
    """The module on ``device``, its weights in the layout that ``config`` asks for."""
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    return module.to(device=device, memory_format=layout)  # type: ignore[call-overload]


def distribute(model: MultiExitNetwork, config: TrainConfig) -> nn.Module:
    """The module to call in training: DDP around the model, or the model itself, sharded.

    Every exit is part of every loss, if only with weight zero, so DDP need not look for unused
    parameters. FSDP2 shards each trunk piece and each exit by itself; the logits that come out
    are plain tensors.
    """
    if parallel.size() == 1:
        return model
    if config.parallel == "fsdp":
        return shard(model, config.compile)
    wrapped = nn.parallel.DistributedDataParallel(model)
    # Each process keeps its own running statistics, until `average_buffers`. (An attribute, for
    # the argument's name is another in every release.)
    wrapped.broadcast_buffers = False
    return wrapped


def shard(model: Any, compiled: bool) -> nn.Module:
    """`fully_shard` on every trunk piece, every exit, and on what is left.

    ``compiled``: each of them by itself, for a compiled graph cannot span what is gathered apart.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    model.to(memory_format=torch.contiguous_format)  # no other layout can be sharded
    # It warns of writing into what exits return. Nothing here does.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
    mesh = init_device_mesh(next(model.parameters()).device.type, (parallel.size(),))
    # Pieces differ in shape, so none should count against the recompilations of another.
    known = inspect.signature(torch.compile).parameters
    alone = {"isolate_recompiles": True} if "isolate_recompiles" in known else {}
    for stage in model.stages:
        for piece in stage.children():
            if compiled:
                piece.compile(dynamic=False, **alone)
            fully_shard(piece, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if mesh.device_type == "cpu":
        # gloo of PyTorch 2.8 takes a mean for a sum; so the sum is asked for, and divided.
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)
    return model


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


# Recomputation --------------------------------------------------------------------------------


def recompute(model: MultiExitNetwork) -> None:
    """Keeps of every stage its inputs only; its backward computes the rest once more."""
    for stage in model.stages:
        stage.forward = partial(_recomputed, stage, stage.forward)  # type: ignore[method-assign]


def _recomputed(stage: nn.Module, forward: Callable, *inputs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*inputs)
    if torch.compiler.is_compiling():  # a graph updates statistics in its forward only
        return checkpoint(forward, *inputs, use_reentrant=False)
    return checkpoint(forward, *inputs, use_reentrant=False, context_fn=partial(_contexts, stage))


def _contexts(stage: nn.Module) -> tuple[Any, Any]:
    return contextlib.nullcontext(), _unnoticed(stage)


@contextlib.contextmanager
def _unnoticed(stage: nn.Module) -> Iterator[None]:
    """Running statistics have seen these rows already."""
    norms = [module for module in stage.modules() if isinstance(module, _BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    try:
        for norm in norms:
            norm.momentum, norm.num_batches_tracked = 0.0, None
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count

# SPDX-License-Identifier: Apache-2.0
"""A multi-exit network cut over processes; torch.distributed.pipelining runs it.

The schedules compute a loss behind the last cut only. So features travel forward with the logits
of all exits so far (and the vectors in front of their classifiers, where the loss compares them),
the last process computes the fused loss over all K exits, and gradients return along the same
edges. A batch is cut into micro-batches; each one's loss is divided by the valid rows of the whole
step, so that the losses add up to exactly its mean, however the ignored rows are spread. Batch
normalisation in training sees one micro-batch at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from msdkern.cli import CommandError
from msdkern.train import parallel
from msdkern.train.config import TrainConfig
from msdkern.train.engines import Seen, place, recompute

if TYPE_CHECKING:
    from msdkern.models import MultiExitNetwork
    from msdkern.nn import MultiExitLoss

SCHEDULES = {"gpipe": "ScheduleGPipe", "1f1b": "Schedule1F1B"}


class Pipeline:
    """Every process runs some stages on all rows; see `msdkern.train.engines.Engine`.

    Weights of the stages that other processes run are on the meta device here.
    """

    copies, sharded = 1, True

    def __init__(
        self,
        model: MultiExitNetwork,
        criterion: MultiExitLoss,
        config: TrainConfig,
        device: torch.device,
        input_shape: tuple[int, ...],
    ) -> None:
        check(config, model.exits)
        self.criterion, self.device, self.exits = criterion, device, model.exits
        self.number, self.count = parallel.rank(), parallel.size()
        self.pieces, self.channels_last = config.micro_batches, config.channels_last
        starts = cuts(model, input_shape, self.count)
        mine = range(*starts[self.number : self.number + 2])
        for number, stage in enumerate(model.stages):
            if number in mine:
                place(stage, device, config)
            else:
                stage.to("meta")
        self.loads = loads(model, starts, criterion.needs_features, config, device, input_shape)
        if config.recompute:
            recompute(model)
        stages, before = model.stages[mine.start : mine.stop], self.loads[self.number]
        last = self.number == self.count - 1
        self.cut = Cut(stages, before, last, criterion.needs_features, config, device)
        self.network = torch.compile(self.cut) if config.compile else self.cut
        rows = config.batch_size // config.micro_batches
        self.schedule = self._schedule(self.network, rows, config.pipeline_schedule, self._loss)
        self._evaluation = functools.cache(
            lambda rows: self._schedule(self.cut, rows, "gpipe", None)
        )
        # Of the batch under way; the loss on the last process reads them.
        self._divisor: dict[str, Any] = {}
        self._seen: Seen = lambda loss, logits, labels: None

    def backward(
        self, images: Tensor, labels: Tensor, divisor: dict[str, Any], last: bool, seen: Seen
    ) -> None:
        """See `Engine`; the last process alone sees losses."""
        self._divisor, self._seen = divisor, seen
        self.schedule.step(*self._first(images), **self._last(target=labels))

    def _loss(self, output: Sequence[Tensor], labels: Tensor) -> Tensor:
        logits, vectors = list(output[: self.exits]), list(output[self.exits :])
        loss = self.criterion(logits, labels, vectors or None, **self._divisor)
        self._seen(loss.detach(), [z.detach() for z in logits], labels)
        return loss

    def answer(self, images: Tensor, labels: Tensor) -> tuple[list[Tensor], Tensor] | None:
        """See `Engine`: all rows, in the last process."""
        rows = -(-len(images) // self.pieces)
        # A schedule takes micro-batches of one size.
        missing = self.pieces * rows - len(images)
        images = torch.cat([images, images[-1:].expand(missing, *images.shape[1:])])
        output = self._evaluation(rows).step(*self._first(images))
        if output is None:
            return None
        return [z[: len(labels)] for z in output[: self.exits]], labels

    def settle(self) -> None:
        """See `Engine`: each layer is in one process, so there is nothing to average."""

    def _first(self, images: Tensor) -> tuple[Tensor, ...]:
        return (sent(images, self.channels_last),) if self.number == 0 else ()

    def _last(self, **target: Tensor) -> dict[str, Tensor]:
        return target if self.number == self.count - 1 else {}

    def _schedule(self, cut: Any, rows: int, name: str, loss: Any) -> Any:
        from torch.distributed import pipelining

        stage = pipelining.PipelineStage(
            cut,
            self.number,
            self.count,
            self.device,
            input_args=self.loads[self.number].example(rows),
            output_args=self.loads[self.number + 1].example(rows),
        )
        kind = getattr(pipelining, SCHEDULES[name])
        return kind(stage, self.pieces, loss_fn=loss, scale_grads=False)


def check(config: TrainConfig, exits: int) -> None:
    """Raises ``CommandError`` if the network or its batches cannot be cut so."""
    count = parallel.size()
    if count > exits:
        raise CommandError(
            f"--parallel: pipeline cuts a network between its exits: {count} processes need as"
            f" many; got {exits}"
        )
    if config.batch_size % config.micro_batches:
        raise CommandError(
            f"--micro-batches: must divide --batch-size {config.batch_size}; got"
            f" {config.micro_batches}"
        )
    if config.micro_batches < count:
        raise CommandError(
            f"--micro-batches: must be at least the {count} processes; got {config.micro_batches}"
        )


# Cutting --------------------------------------------------------------------------------------


def cuts(model: MultiExitNetwork, input_shape: Sequence[int], parts: int) -> list[int]:
    """The first stage of every part, then the number of stages; see `even_cuts`."""
    from msdkern.models import multiply_adds

    return even_cuts(multiply_adds(model, input_shape), parts)


def even_cuts(totals: Sequence[int], parts: int) -> list[int]:
    """Cuts a row of costs, given as running ``totals``, so that the largest part is smallest."""
    before = [0, *totals]

    @functools.cache
    def best(start: int, parts: int) -> tuple[int, list[int]]:
        if parts == 1:
            return before[-1] - before[start], [start]
        ends = range(start + 1, len(before) - parts + 1)
        choices = ((best(end, parts - 1), end) for end in ends)
        return min(
            (max(before[end] - before[start], largest), [start, *rest])
            for (largest, rest), end in choices
        )

    return [*best(0, parts)[1], len(totals)]


class Load(NamedTuple):
    """What travels over one edge: features as they are nested, then logits, then vectors.

    ``kinds``: dtype and shape, without its rows, of every tensor as it is sent.
    """

    spec: TreeSpec
    features: int
    logits: int
    kinds: list[tuple[torch.dtype, tuple[int, ...]]]

    def example(self, rows: int) -> tuple[Tensor, ...]:
        """Tensors of these kinds without storage."""
        return tuple(
            torch.empty(
                (rows, *shape), dtype=dtype, device="meta", requires_grad=dtype.is_floating_point
            )
            for dtype, shape in self.kinds
        )


def loads(
    model: Any,
    starts: Sequence[int],
    vectors: bool,
    config: TrainConfig,
    device: torch.device,
    input_shape: Sequence[int],
) -> list[Load]:
    """What travels into every part and, the last one, out of the network.

    The whole network runs on fake tensors of ``device``: shapes and dtypes, nothing is computed.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    found = []
    with FakeTensorMode(), torch.no_grad(), autocast(config, device):
        features: Any = torch.empty((2, *input_shape), device=device)
        answers: list[list[Tensor]] = [[], []] if vectors else [[]]
        for number, stage in enumerate(model.stages):
            if number in starts:
                found.append(load(features, answers, config.channels_last))
            arguments = (features, *answers)
            state = {
                name: torch.empty(value.shape, dtype=value.dtype, device=device)
                for name, value in (*stage.named_parameters(), *stage.named_buffers())
            }
            features, *answers = torch.func.functional_call(stage, state, arguments)
    return [*found, load((), answers, False)]


def load(features: Any, answers: Sequence[list[Tensor]], channels_last: bool) -> Load:
    """The kinds of these tensors."""
    leaves, spec = tree_flatten(features)
    tensors = [
        *(sent(x, channels_last) for x in leaves),
        *(x for answer in answers for x in answer),
    ]
    kinds = [(x.dtype, tuple(x.shape[1:])) for x in tensors]
    return Load(spec, len(leaves), len(answers[0]), kinds)


def sent(x: Tensor, channels_last: bool) -> Tensor:
    """Maps travel with the channels innermost where they are kept so: that copies nothing."""
    x = x.movedim(1, -1) if channels_last and x.dim() == 4 else x
    return x.reshape(-1).view(x.shape)  # strides of no choice, also along axes of length 1


def received(x: Tensor, channels_last: bool) -> Tensor:
    """Undoes `sent`."""
    return x.movedim(-1, 1) if channels_last and x.dim() == 4 else x


def autocast(config: TrainConfig, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=config.amp)


class Cut(nn.Module):
    """Stages in a row, as a module from tensors to tensors: ``(*features, *logits, *vectors)``.

    Vectors travel where the loss compares them; the last one returns no features.
    """

    def __init__(
        self,
        stages: nn.ModuleList,
        before: Load,
        last: bool,
        vectors: bool,
        config: TrainConfig,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.stages, self.before, self.last, self.vectors = stages, before, last, vectors
        self.config, self.device = config, device

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        features, answers = self._unpack(tensors)
        with autocast(self.config, self.device):
            for stage in self.stages:
                features, *answers = stage(features, *answers)
        carried = (x for answer in answers for x in answer)
        if self.last:
            return tuple(carried)
        maps = (sent(x, self.config.channels_last) for x in tree_leaves(features))
        return (*maps, *carried)

    def _unpack(self, tensors: Sequence[Tensor]) -> tuple[Any, list[list[Tensor]]]:
        before = self.before
        maps = [received(x, self.config.channels_last) for x in tensors[: before.features]]
        # Views: the engine detaches in place what comes out, and what came in must stay as it is.
        carried = [x.view_as(x) for x in tensors[before.features :]]
        answers = [carried[: before.logits]]
        if self.vectors:
            answers.append(carried[before.logits :])
        return tree_unflatten(maps, before.spec), answers

# SPDX-License-Identifier: Apache-2.0
"""Everything that moves during a run, and its journey into a checkpoint and back."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from msdkern.cli import CommandError
from msdkern.train import checkpoint, parallel, sharded
from msdkern.train.batches import TrainBatches
from msdkern.train.config import TrainConfig, check_fields
from msdkern.train.data import Dataset
from msdkern.train.engines import DataParallel, Engine
from msdkern.train.log import Meter
from msdkern.train.pipeline import Pipeline

if TYPE_CHECKING:
    from msdkern.models import MultiExitNetwork
    from msdkern.nn import MultiExitLoss


# In older releases a recomputed graph changes the buffers of its modules once more (2.8 does).
GRAPHS_RECOMPUTE = torch.torch_version.TorchVersion(torch.__version__) >= "2.13"
# Who computes the steps, by --parallel; one process needs no choice.
ENGINES: dict[str, Any] = {"ddp": DataParallel, "fsdp": DataParallel, "pipeline": Pipeline}


def pick_device(name: str) -> torch.device:
    """The device called ``name``; "auto" is a GPU if there is one. Raises ``CommandError``."""
    if parallel.size() > 1 and (name == "cuda" or (name == "auto" and torch.cuda.is_available())):
        return parallel.local_device()
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().split("\n")[0]
        raise CommandError(f"--device: {name!r} cannot be used: {reason}") from None
    return device


def choose_executor(name: str) -> contextlib.AbstractContextManager:
    """Who computes the losses; "auto" leaves it to msdkern. Raises ``CommandError``."""
    from msdkern import executors

    if name == "auto":
        return contextlib.nullcontext()
    known = executors.table()["multi_exit_loss"]
    if name not in known:
        raise CommandError(f"--executor: must be one of auto, {', '.join(known)}; got {name!r}")
    if known[name] is not None:
        raise CommandError(f"--executor: {name} cannot serve: {known[name]}")
    return executors.executor(name)


@contextlib.contextmanager
def cpu_threads(config: TrainConfig, dataset: Dataset) -> Iterator[None]:
    """The threads that ``config`` asks for, as long as the block runs.

    By default small images get one: there two threads wait for each other longer than they work,
    and on a busy computer thirty times longer.
    """
    _, height, width = dataset.input_shape
    before = torch.get_num_threads()
    torch.set_num_threads(config.threads or (1 if height * width <= 256 else before))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def build_model(config: TrainConfig, classes: int, channels: int) -> MultiExitNetwork:
    """The network that ``config`` names, its weights drawn from the seed.

    Raises ``CommandError`` for an unknown name or option.
    """
    from msdkern import models

    options: dict[str, Any] = {} if config.width is None else {"width": config.width}
    try:
        torch.manual_seed(config.seed)
        model = models.create(config.model, classes, channels, **options)
        if config.exits is None or config.exits == model.exits:
            return model
        if config.exits > model.exits:
            raise CommandError(
                f"--exits: {config.model} has at most {model.exits}; got {config.exits}"
            )
        torch.manual_seed(config.seed)
        options["at"] = range(model.exits - config.exits, model.exits)
        return models.create(config.model, classes, channels, **options)
    except (ValueError, TypeError) as error:
        raise CommandError(f"--model: {error}") from None


def build_criterion(config: TrainConfig, exits: int) -> MultiExitLoss:
    """The loss that ``config`` names. Raises ``CommandError`` if it cannot be trained with."""
    from msdkern import nn as losses

    try:
        criterion = losses.create(config.loss, exits=exits, **config.loss_options())
    except (ValueError, TypeError) as error:
        raise CommandError(f"--loss: {error}") from None
    if criterion.needs_teacher:
        raise CommandError(
            f"--loss: {config.loss} learns from the logits of another network, which train does"
            " not have; call msdkern.nn.create in a loop of your own"
        )
    if parallel.size() > 1:
        check_divisible(config, criterion)
    return criterion


def check_divisible(config: TrainConfig, criterion: MultiExitLoss) -> None:
    """Raises ``CommandError`` for a loss whose parts in several processes are not its whole."""
    options = criterion.options
    features = criterion.feature_options["reduction"] if criterion.needs_features else None
    rules = {
        f"--loss: {config.loss} adapts its temperature to the rows of one process; train it with"
        " one, or without adaptive": bool(criterion.adapt_temperature),
        "--loss-option: reduction=sum and a feature term, which is a mean, cannot be added up over"
        " processes; leave one of them out": options["reduction"] == "sum" and bool(features),
        "--loss-option: feature_reduction=norm is a norm over all rows, which cannot be added up"
        " over processes; take another": features == "norm",
        "--loss-option: class_weight divides by the weights of a batch's labels, which no process"
        " knows alone; pass reduction=sum": criterion.class_weight is not None
        and options["reduction"] == "mean",
    }
    for sentence, broken in rules.items():
        if broken:
            raise CommandError(sentence)


def build_optimizer(config: TrainConfig, modules: list[nn.Module]) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum; only matrices and convolutions decay."""
    weights = [p for module in modules for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in weights if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in weights if p.ndim <= 1], "weight_decay": 0.0},
    ]
    nesterov = config.momentum > 0
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=nesterov)


def learning_rate(config: TrainConfig, step: int, total: int) -> float:
    """The learning rate of a step: a linear rise, then what the schedule makes of it.

    constant; cosine, half a cosine down to zero; multistep, a tenth from half of all steps on and
    a hundredth from three quarters, as DenseNet and MSDNet are trained on CIFAR.
    """
    rise = round(config.warmup * total)
    if step < rise:
        return config.lr * (step + 1) / rise
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "multistep":
        return config.lr * 0.1 ** ((step >= total / 2) + (step >= 0.75 * total))
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - rise) / (total - rise)))


class Run:
    """Network, loss, optimiser, meters and position; the seed decides all that is random."""

    def __init__(self, config: TrainConfig, dataset: Dataset) -> None:
        from msdkern.models import multiply_adds

        if config.compile and config.recompute and not GRAPHS_RECOMPUTE:
            raise CommandError(
                "--recompute: together with --compile, which would count rows twice in running"
                f" statistics, needs PyTorch 2.13; got {torch.__version__}"
            )
        self.config, self.dataset = config, dataset
        self.device = pick_device(config.device)
        model = build_model(config, len(dataset.classes), dataset.input_shape[0])
        self.model = model
        self.criterion = build_criterion(config, model.exits).to(self.device)
        # Counted before weights are sharded: `evaluate` could not any more.
        several = parallel.size() > 1
        self.madds = multiply_adds(model, dataset.input_shape) if several else None
        kind = ENGINES[config.parallel if several else "ddp"]
        self.engine: Engine = kind(model, self.criterion, config, self.device, dataset.input_shape)
        self.optimizer = build_optimizer(config, [self.model, self.criterion])
        self.batches = TrainBatches(config, dataset, self.device)
        self.total_steps = config.epochs * self.batches.steps
        self.sums = self.criterion.options["reduction"] == "sum"
        self.epoch, self.batch, self.step = 0, 0, 0
        self.interval_meter = Meter(self.model.exits, self.device)
        self.epoch_meter = Meter(self.model.exits, self.device)
        self.seconds = 0.0

    def prepare_step(self) -> None:
        """Sets what follows from the step's number: learning rate and the loss's schedules."""
        rate = learning_rate(self.config, self.step, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.criterion.set_progress(self.step / self.total_steps)

    def divisor(self, valid: Tensor | None) -> dict[str, Tensor]:
        """What the criterion divides by: ``valid`` rows of the step, or those of its only piece.

        Sums over pieces add up by themselves; means must all divide by the rows of the step.
        """
        return {} if valid is None or self.sums else {"normalizer": valid}

    def state(self, log_size: int) -> dict[str, Any]:
        """What a checkpoint holds. Schedule, order and augmentation follow from the position.

        Sums are those of the whole run, and so are weights, of which this process may hold a
        part: any number of processes can go on.
        """
        self.engine.settle()
        meters = (self.interval_meter, self.epoch_meter)
        return {
            "config": self.config.to_dict(),
            "model": self.model.state_dict(),
            "criterion": self.criterion.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "epoch": self.epoch,
            "batch": self.batch,
            "step": self.step,
            "meters": [parallel.sum_over(meter.sums) for meter in meters],
            "seconds": self.seconds,
            "log_size": log_size,
            "random": checkpoint.random_state(),
            "fingerprint": self.dataset.fingerprint,
            "classes": list(self.dataset.classes),
            "input_shape": list(self.dataset.input_shape),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continues from ``state``. Raises ``CommandError`` if the images are not the same."""
        if state["fingerprint"] != self.dataset.fingerprint:
            raise CommandError(
                f"--resume: the images of --data {self.config.data} are not those the run began"
                f" with (fingerprint {self.dataset.fingerprint[:12]}, then"
                f" {state['fingerprint'][:12]})"
            )
        self.restore_tensors(state)
        self.criterion.load_state_dict(state["criterion"])
        self.epoch, self.batch, self.step = state["epoch"], state["batch"], state["step"]
        self.seconds = state["seconds"]
        for meter, sums in zip(
            (self.interval_meter, self.epoch_meter), state["meters"], strict=True
        ):
            meter.sums.copy_(sums / parallel.size())
        checkpoint.set_random_state(state["random"])

    @torch.no_grad()
    def restore_tensors(self, state: dict[str, Any]) -> None:
        """Fills what this process holds of the network and of the optimiser's state."""
        rest, saved = checkpoint.split(state)
        where = state.get(checkpoint.SHARDS)
        names = sharded.names(Path(where)) if where else saved
        own = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        weights = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        for name in names:
            kind, number, *_ = name.split(".")
            if kind == "optimizer":
                own[name] = torch.zeros_like(weights[int(number)])
        own = {name: value for name, value in own.items() if not value.is_meta}
        if where:
            sharded.read(Path(where), own)
        else:
            parallel.together(lambda: sharded.fill(own, saved))
        self.optimizer.load_state_dict(checkpoint.join(rest, own)["optimizer"])


def config_of(state: dict[str, Any]) -> TrainConfig:
    """The config in a checkpoint, checked like one from a file."""
    return TrainConfig(**check_fields(state["config"], "checkpoint"))

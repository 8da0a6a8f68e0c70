# SPDX-License-Identifier: Apache-2.0
"""One frozen dataclass says all about a run: its fields are the options of the command line."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from msdkern.cli import CommandError


def option(default: Any, text: str, *, choices: tuple = (), free: bool = False) -> Any:
    """A field with its help text; a ``free`` one may change when a run is resumed."""
    return field(default=default, metadata={"help": text, "choices": choices, "free": free})


@dataclass(frozen=True)
class TrainConfig:
    """What is trained, on what, and how; two runs of one config end in the same bits.

    Raises ``CommandError`` when a value is outside its range.
    """

    out: str = option("", "folder of the run (default: a new one under runs/)", free=True)
    data: str = option("digits", "the images", choices=("digits", "cifar10", "synthetic"))
    root: str = option("", "folder of the images, for --data cifar10", free=True)
    cache: bool = option(False, "keep decoded images as one file beside --out", free=True)
    held_out: float = option(0.2, "held-out share, where the data bring no test set of their own")
    validation: int = option(0, "training rows set aside: not trained on, for calibrate")
    split_seed: int = option(0, "seed of these splits; separate from --seed, so runs compare")
    augment: str = option(
        "auto",
        "random shifts, and mirror images; auto: what suits the data",
        choices=("auto", "none", "crop", "crop+flip"),
    )

    model: str = option("resnet8", "a name that msdkern.models knows")
    width: int | None = option(None, "channels of the first stage (default: the model's own)")
    exits: int | None = option(None, "number of exits, the deepest ones (default: the model's own)")

    loss: str = option("msd", "a name that msdkern.nn knows")
    alpha: float | None = option(None, "share of the exits' teaching (default: the loss's own)")
    temperature: float | None = option(None, "temperature T (default: the loss's own)")
    beta_begin: float | None = option(None, "feature weight at the start (default: the loss's own)")
    beta_end: float | None = option(None, "feature weight at the end (default: the loss's own)")
    loss_option: tuple[str, ...] = option((), "further NAME=VALUE of the loss; may be repeated")

    epochs: int = option(20, "passes over the training rows")
    batch_size: int = option(64, "rows per forward and backward, over all processes")
    accumulate: int = option(1, "batches whose gradients make one step")
    lr: float = option(0.1, "peak learning rate of SGD with Nesterov momentum")
    momentum: float = option(0.9, "momentum")
    weight_decay: float = option(5e-4, "weight decay of the matrices; biases and norms have none")
    schedule: str = option(
        "cosine",
        "learning rate over the steps; multistep: a tenth from 50%, a hundredth from 75%",
        choices=("cosine", "constant", "multistep"),
    )
    warmup: float = option(0.05, "share of the steps over which the learning rate first rises")
    seed: int = option(0, "seed of weights, order and augmentation")

    device: str = option(
        "auto", "cpu, cuda, cuda:1, ...; auto takes a GPU if there is one", free=True
    )
    parallel: str = option(
        "ddp",
        "how the processes of torchrun share a run: whole copies, sharded weights, or stages",
        choices=("ddp", "fsdp", "pipeline"),
        free=True,
    )
    pipeline_schedule: str = option(
        "1f1b", "order of forwards and backwards", choices=("gpipe", "1f1b"), free=True
    )
    micro_batches: int = option(4, "parts of a batch that a pipeline has under way", free=True)
    recompute: bool = option(
        False, "keep the inputs of every stage only, and compute it twice: less memory", free=True
    )
    executor: str = option("auto", "who computes the losses: auto, eager, cpu, ...", free=True)
    threads: int = option(
        0, "CPU threads; 0: one for images up to 16x16, else PyTorch's choice", free=True
    )
    amp: bool = option(False, "compute the network in bfloat16: slow on CPUs that cannot")
    compile: bool = option(False, "torch.compile the network and its loss")
    channels_last: bool = option(True, "keep channels innermost in memory: faster convolutions")

    checkpoint_every: int = option(0, "steps between checkpoints; 0: after every epoch", free=True)
    log_every: int = option(50, "steps between two lines of log.jsonl")
    quiet: bool = option(False, "no progress on standard error", free=True)

    def __post_init__(self) -> None:
        for name, (holds, rule) in RULES.items():
            value = getattr(self, name)
            if value is not None and not holds(value):
                raise CommandError(f"{flag(name)}: must be {rule}; got {value!r}")
        for item in fields(self):
            choices = item.metadata["choices"]
            if choices and getattr(self, item.name) not in choices:
                raise CommandError(
                    f"{flag(item.name)}: must be one of {', '.join(choices)};"
                    f" got {getattr(self, item.name)!r}"
                )

    def to_dict(self) -> dict[str, Any]:
        """The config as JSON keeps it."""
        return {**asdict(self), "loss_option": list(self.loss_option)}

    def loss_options(self) -> dict[str, Any]:
        """Keyword arguments for ``msdkern.nn.create``: only what was asked for."""
        named = ("alpha", "temperature", "beta_begin", "beta_end")
        given = {name: getattr(self, name) for name in named if getattr(self, name) is not None}
        return {**given, **dict(_name_and_value(text) for text in self.loss_option)}


def _at_least(low: float) -> tuple[Callable[[Any], bool], str]:
    return (lambda value: math.isfinite(value) and value >= low), f"at least {low:g}"


def _above(low: float) -> tuple[Callable[[Any], bool], str]:
    return (lambda value: math.isfinite(value) and value > low), f"above {low:g}"


def _within(low: float, high: float) -> tuple[Callable[[Any], bool], str]:
    return (lambda value: low <= value < high), f"in [{low:g}, {high:g})"


RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "held_out": ((lambda value: 0 < value < 1), "between 0 and 1"),
    "width": _at_least(1),
    "exits": _at_least(1),
    "temperature": _above(0),
    "epochs": _at_least(1),
    "batch_size": _at_least(1),
    "accumulate": _at_least(1),
    "micro_batches": _at_least(1),
    "lr": _above(0),
    "momentum": _within(0, 1),
    "weight_decay": _at_least(0),
    "warmup": _within(0, 1),
    "seed": _at_least(0),
    "validation": _at_least(0),
    "split_seed": _at_least(0),
    "threads": _at_least(0),
    "checkpoint_every": _at_least(0),
    "log_every": _at_least(1),
    "loss_option": (
        (lambda value: all("=" in text for text in value)),
        "NAME=VALUE, for instance reduction=sum",
    ),
}
_PARSERS = {"str": str, "int": int, "float": float, "int | None": int, "float | None": float}


def flag(name: str) -> str:
    """The command line's spelling of a field."""
    return "--" + name.replace("_", "-")


def _name_and_value(text: str) -> tuple[str, Any]:
    name, value = text.split("=", 1)
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def add_config_arguments(parser: argparse.ArgumentParser, leave_out: Iterable[str] = ()) -> None:
    """One option for every field of ``TrainConfig``; an option not given leaves no attribute."""
    parser.add_argument("--config", metavar="FILE", help="read options from this JSON file first")
    for item in fields(TrainConfig):
        if item.name in leave_out:
            continue
        text = item.metadata["help"].replace("%", "%%")
        if item.default not in ("", None, ()) and item.type != "bool":
            text += f" (default: {item.default})"
        settings: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text}
        if item.type == "bool":
            settings["action"] = argparse.BooleanOptionalAction
        elif item.type in _PARSERS:
            settings["type"] = _PARSERS[str(item.type)]
            settings["metavar"] = str(item.type).split()[0].upper()
            if item.metadata["choices"]:
                settings |= {"choices": item.metadata["choices"], "metavar": None}
        else:
            settings |= {"action": "append", "metavar": "NAME=VALUE"}
        parser.add_argument(flag(item.name), **settings)


def given_options(args: argparse.Namespace) -> dict[str, Any]:
    """The fields that the command line or its --config file names, the command line winning."""
    names = {item.name for item in fields(TrainConfig)}
    given = {name: value for name, value in vars(args).items() if name in names}
    if args.config:
        given = {**read_fields(Path(args.config)), **given}
    if "loss_option" in given:
        given["loss_option"] = tuple(given["loss_option"])
    return given


def read_fields(path: Path) -> dict[str, Any]:
    """The fields in a JSON file, their names and types checked."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CommandError(f"{path}: not a JSON file ({error})") from None
    if not isinstance(values, dict):
        raise CommandError(f"{path}: must hold one JSON object; got {type(values).__name__}")
    return check_fields(values, str(path))


def check_fields(values: dict[str, Any], where: str) -> dict[str, Any]:
    """``values`` with every name and type checked; lists become tuples, integers floats."""
    kinds = {item.name: str(item.type) for item in fields(TrainConfig)}
    checked = {}
    for name, value in values.items():
        if name not in kinds:
            raise CommandError(f"{where}: {name!r} is not an option of train")
        kind = kinds[name]
        if kind.startswith("float") and type(value) is int:
            value = float(value)
        if kind.startswith("tuple") and isinstance(value, list):
            value = tuple(str(item) for item in value)
        expected = kind.split("[")[0].split(" | ")
        if type(value).__name__.replace("NoneType", "None") not in expected:
            raise CommandError(f"{where}: {name} must be {kind}; got {value!r}")
        checked[name] = value
    return checked


def resume_config(stored: TrainConfig, given: dict[str, Any]) -> TrainConfig:
    """The stored config with the free fields of ``given``; any other difference is refused."""
    for item in fields(TrainConfig):
        old, new = getattr(stored, item.name), given.get(item.name, getattr(stored, item.name))
        if new != old and not item.metadata["free"]:
            raise CommandError(
                f"--resume: {flag(item.name)} is {old!r} in the run that is there; got {new!r}"
            )
    return replace(stored, **given)

# SPDX-License-Identifier: Apache-2.0
"""What a network knows at every exit, and the command that reads it from a checkpoint."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from msdkern.cli import CommandError
from msdkern.train import checkpoint, data, parallel
from msdkern.train.batches import Normalise, in_order
from msdkern.train.config import TrainConfig
from msdkern.train.data import Dataset
from msdkern.train.options import add_batch_size, add_checkpoint_arguments, given_fields

if TYPE_CHECKING:
    from msdkern.models import MultiExitNetwork

# The logits and labels of a batch that this process answers for, or None: `answer` of an engine.
Answer = Callable[[Tensor, Tensor], tuple[list[Tensor], Tensor] | None]
BATCH_SIZE = 512  # one size for train and evaluate: their tables are equal to the last digit


@torch.no_grad()
def evaluate(
    model: MultiExitNetwork,
    dataset: Dataset,
    config: TrainConfig,
    device: torch.device,
    madds: Sequence[int] | None = None,
    answer: Answer | None = None,
) -> dict[str, Any]:
    """Every exit on the held-out rows.

    Returns ``{"exits": [{"exit": 1.., "accuracy", "cross_entropy", "confidence", "madds"}, ...],
    "rows": N}`` and ``"best_accuracy"`` where it is known. Cross entropy and confidence are means
    over rows; madds are multiply-adds of one image up to that exit, counted unless given. Leaves
    the model in evaluation mode. ``answer`` says who of several processes runs what, by default
    this one everything; all of them know the result.
    """
    import msdkern
    from msdkern import models

    model.eval()
    answer = answer or (lambda images, labels: (model(images), labels))
    sums = torch.zeros(3, model.exits, dtype=torch.float64)
    normalise = Normalise(dataset, device, config.channels_last)
    for images, labels in in_order(dataset.held_out, normalise, BATCH_SIZE, device):
        with torch.autocast(device.type, torch.bfloat16, enabled=config.amp):
            answered = answer(images, labels)
        if answered is None:
            continue
        logits, labels = answered
        known = msdkern.exit_statistics(logits)
        at_label = torch.stack([z.gather(1, labels[:, None])[:, 0].float() for z in logits])
        batch = (known.prediction == labels, known.lse - at_label, known.confidence)
        sums += torch.stack([value.cpu().double().sum(1) for value in batch])
    rows = len(dataset.held_out)
    accuracy, cross_entropy, confidence = (parallel.sum_over(sums) / rows).tolist()
    madds = madds or models.multiply_adds(model, dataset.input_shape)
    columns = zip(accuracy, cross_entropy, confidence, madds, strict=True)
    names = ("accuracy", "cross_entropy", "confidence", "madds")
    exits = [
        {"exit": number, **dict(zip(names, values, strict=True))}
        for number, values in enumerate(columns, 1)
    ]
    known_best = {} if dataset.best_accuracy is None else {"best_accuracy": dataset.best_accuracy}
    return {"exits": exits, "rows": rows, **known_best}


class Trained(NamedTuple):
    """What a checkpoint holds, ready to answer: the network on its device, and its images."""

    model: MultiExitNetwork
    dataset: Dataset
    config: TrainConfig
    device: torch.device


@contextlib.contextmanager
def opened(path: Path, given: dict[str, Any]) -> Iterator[Trained]:
    """The checkpoint at ``path``; ``given`` replaces fields of its config.

    Inside the block its executor computes, with its number of threads. Raises ``CommandError`` if
    the images are not those that it was trained on.
    """
    from msdkern.train.engines import place
    from msdkern.train.run import (
        build_model,
        choose_executor,
        config_of,
        cpu_threads,
        pick_device,
    )

    state = checkpoint.load(path)
    config = replace(config_of(state), **given)
    dataset = data.load(config)
    if dataset.fingerprint != state["fingerprint"]:
        raise CommandError(
            f"{path}: was trained on other images than those of --data {config.data}; for another"
            " folder pass --root"
        )
    device = pick_device(config.device)
    model = build_model(config, len(dataset.classes), dataset.input_shape[0])
    model.load_state_dict(state["model"])
    with choose_executor(config.executor), cpu_threads(config, dataset):
        yield Trained(place(model, device, config).eval(), dataset, config, device)


def evaluate_checkpoint(
    path: Path,
    given: dict[str, Any],
    thresholds: str = "",
    budgets: Sequence[float] = (),
    batch_size: int = BATCH_SIZE,
) -> dict[str, Any]:
    """The report of the checkpoint at ``path``; ``given`` replaces fields of its config.

    With a file of ``thresholds``, or with ``budgets``, there is an entry "early": what leaving
    early by the file, and within each of these shares of the multiply-adds, gives.
    """
    with opened(path, given) as trained:
        started = time.perf_counter()
        report = evaluate(trained.model, trained.dataset, trained.config, trained.device)
        seconds = time.perf_counter() - started
        if thresholds or budgets:
            from msdkern.infer.evaluation import evaluate_early

            report["early"] = evaluate_early(trained, thresholds, budgets, batch_size)
    return {**report, "checkpoint": str(path), "seconds": seconds}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint_arguments(parser)
    parser.add_argument(
        "--thresholds", default="", help="also leave early by this file of msdkern calibrate"
    )
    parser.add_argument(
        "--budget",
        type=shares,
        default=(),
        metavar="SHARE,...",
        help="also leave early within these shares of the multiply-adds, with thresholds from the"
        " rows that training set aside, and draw the curves",
    )
    parser.add_argument("--out", help="folder of the pictures (default: beside the checkpoint)")
    add_batch_size(parser)


def shares(text: str) -> tuple[float, ...]:
    """Numbers above 0 up to 1, separated by commas."""
    try:
        values = tuple(float(word) for word in text.split(","))
    except ValueError:
        values = ()
    if not values or not all(0 < value <= 1 for value in values):
        raise argparse.ArgumentTypeError(f"must be numbers above 0, at most 1; got {text!r}")
    return values


def run(args: argparse.Namespace) -> int:
    """``msdkern evaluate``: the table that train printed, and what leaving early gives."""
    from msdkern.train.report import table

    path = Path(args.checkpoint)
    given = given_fields(args)
    report = evaluate_checkpoint(path, given, args.thresholds, args.budget, args.batch_size)
    print(table(report))
    if "early" in report:
        say_early(report["early"], Path(args.out) if args.out else path.parent)
    if args.json:
        print(json.dumps(report))
    sys.stdout.flush()
    return 0


def say_early(early: dict[str, Any], folder: Path) -> None:
    """The table of leaving early, and its pictures."""
    from msdkern.calibrate.sets import SEEN
    from msdkern.infer import evaluation, plots

    if early["calibrated_on"] == "held-out":
        print(f"msdkern evaluate: {SEEN}", file=sys.stderr)
    print(evaluation.table(early))
    print(plots.draw(early, folder), file=sys.stderr)

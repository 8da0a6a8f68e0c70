# SPDX-License-Identifier: Apache-2.0
"""The training loop: steps, epochs, checkpoints, and the report at the end."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msdkern.cli import CommandError
from msdkern.train import checkpoint, data, parallel
from msdkern.train.config import TrainConfig, check_fields
from msdkern.train.evaluate import evaluate
from msdkern.train.files import FolderLock, write_atomically
from msdkern.train.log import Log, Progress
from msdkern.train.run import Run, choose_executor, cpu_threads, pick_device

FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)  # the disk, a limit, a quota
LogCallable = Callable[[dict[str, Any], int], object]


def fit(
    config: TrainConfig, resume: bool = False, log: LogCallable | None = None
) -> dict[str, Any]:
    """Trains as ``config`` says, in ``config.out``, and returns the report of its last epoch.

    Args:
        config: what to train; ``config.out`` must name a folder.
        resume: continue the run in that folder, to the bits it would have reached undisturbed;
            a finished run returns its report, an empty folder starts a new run.
        log: also called with every record of ``log.jsonl`` and its step.

    Returns:
        ``{"exits": [{"exit", "accuracy", "cross_entropy", "confidence", "madds"}, ...],
        "checkpoint", "seconds", ...}``, also written to ``result.json``.

    Raises:
        CommandError: in one sentence, for all that the caller can mend.
    """
    with parallel.process_group(config.device):
        return fit_together(config, resume, log)


def fit_together(config: TrainConfig, resume: bool, log: LogCallable | None) -> dict[str, Any]:
    """`fit` in every process of the group."""
    folder = Path(config.out)
    with contextlib.ExitStack() as stack:

        def begin() -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
            stack.enter_context(FolderLock(folder))
            if resume and (folder / "result.json").exists():
                return read_json(folder / "result.json"), None
            if not resume:
                refuse_used(folder)
            return None, checkpoint.load_newest(folder, warn) if resume else None

        report, state = parallel.first(begin)
        if report is not None:
            return report
        stack.enter_context(parallel.together(lambda: choose_executor(config.executor)))
        dataset = parallel.together(lambda: data.load(config))
        parallel.together(lambda: pick_device(config.device))
        run = parallel.together(lambda: Run(config, dataset))
        if state is not None:
            parallel.together(lambda: run.restore(state))
        try:
            if parallel.rank() == 0:
                write_json(folder / "config.json", config.to_dict())
            with cpu_threads(config, dataset):
                return train(run, folder, state["log_size"] if state else 0, log)
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise parallel.agreed(
                f"{error.filename}: {error.strerror}; what was saved before is whole: make room"
                " and continue with --resume"
            ) from None


def warn(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def refuse_used(folder: Path) -> None:
    """Raises ``CommandError`` if ``folder`` holds a run already, finished or not."""
    if (folder / "result.json").exists():
        raise CommandError(
            f"{folder}: holds a finished run; choose another --out, or print it again with"
            f" `msdkern evaluate {folder / checkpoint.LAST}`"
        )
    if (folder / "config.json").exists():
        raise CommandError(
            f"{folder}: holds a run that has not finished; continue it with --resume or choose"
            " another --out"
        )


def stored_config(folder: Path) -> TrainConfig | None:
    """The config that a run in ``folder`` began with, or None if there is none."""
    path = folder / "config.json"
    return TrainConfig(**check_fields(read_json(path), str(path))) if path.exists() else None


def train(run: Run, folder: Path, log_size: int, extra: LogCallable | None) -> dict[str, Any]:
    """All epochs that are left."""
    config = run.config
    rows_per_step = config.batch_size * config.accumulate
    progress = Progress(run.total_steps, run.step, rows_per_step, config.quiet)
    log = Log(folder / "log.jsonl", log_size)

    def record(entry: dict[str, Any]) -> None:
        log.write(entry)
        if extra is not None and parallel.rank() == 0:
            extra(entry, run.step)

    def save() -> None:
        state = run.state(log.sync())
        if run.engine.sharded:
            checkpoint.save_sharded(folder, state)
        elif parallel.rank() == 0:
            checkpoint.save(folder, state)

    held_out: dict[str, Any] | None = None
    try:
        while run.epoch < config.epochs:
            train_epoch(run, progress, record, save)
            held_out = examine(run)
            end_epoch(run, progress, record, held_out)
            save()
        if held_out is None:
            held_out = examine(run)
    finally:
        progress.close()
        log.close()
    report = {
        **held_out,
        "checkpoint": str(folder / checkpoint.LAST),
        "seconds": run.seconds,
    }
    if parallel.rank() == 0:
        write_json(folder / "result.json", report)
    return report


def examine(run: Run) -> dict[str, Any]:
    """The held-out rows by all processes."""
    run.engine.settle()
    ask = run.engine.answer
    return evaluate(run.model, run.dataset, run.config, run.device, run.madds, ask)


def train_epoch(
    run: Run,
    progress: Progress,
    record: Callable[[dict[str, Any]], None],
    save: Callable[[], None],
) -> None:
    """The steps of one epoch that are left, with their log lines and checkpoints."""
    config = run.config
    run.model.train()
    batches = run.batches.epoch(run.epoch, run.batch)
    clock = Clock(run)
    while group := list(islice(batches, config.accumulate)):
        train_step(run, group)
        run.step += 1
        run.batch += config.accumulate
        progress.advance(config.batch_size * config.accumulate)
        if run.step % config.log_every == 0:
            means = finite(run)
            progress.show(means)
            record(
                {
                    "kind": "steps",
                    "epoch": run.epoch + 1,
                    "step": run.step,
                    "lr": run.optimizer.param_groups[0]["lr"],
                    **means,
                    "rows_per_second": clock.lap(),
                }
            )
            run.interval_meter.clear()
        if config.checkpoint_every and run.step % config.checkpoint_every == 0:
            finite(run)
            clock.stop()
            save()
            clock.start()
    clock.stop()


def train_step(run: Run, group: list[tuple[Tensor, Tensor]]) -> None:
    """Forward and backward of every batch of the group, then one step of the optimiser.

    A batch may have several pieces, and several processes may share it. Each piece's loss is
    divided by the valid rows of all of them, so that the gradients add up to those of one large
    batch.
    """
    run.prepare_step()
    parts = len(group) * run.engine.pieces * run.engine.copies
    valid = valid_rows(run, group) if parts > 1 else None
    seen = partial(measure, run, parts, valid)
    for number, (images, labels) in enumerate(group, 1):
        run.engine.backward(images, labels, run.divisor(valid), number == len(group), seen)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)


def valid_rows(run: Run, group: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Rows of the step that are not ignored, over all processes that share it."""
    count = torch.stack([(labels >= 0).sum() for _, labels in group]).sum()
    return parallel.sum_over(count) if run.engine.copies > 1 else count


@torch.no_grad()
def measure(
    run: Run, parts: int, valid: Tensor | None, loss: Tensor, logits: list[Tensor], labels: Tensor
) -> None:
    """Adds one of the ``parts`` of a step to the meters; nothing waits for the device.

    The loss counts as the step's mean, the cross entropies, which are means over the part, by its
    share of the step's ``valid`` rows.
    """
    share: float | Tensor = 1.0
    if valid is not None:
        share = (labels >= 0).sum() * parts / valid.clamp(min=1)
    cross_entropy = run.criterion.terms["cross_entropy"] * share
    rows = run.config.batch_size * run.config.accumulate / parts
    correct = torch.stack([(z.argmax(1) == labels).sum() for z in logits])
    for meter in (run.interval_meter, run.epoch_meter):
        meter.add(loss * parts, correct, cross_entropy, rows)


def finite(run: Run) -> dict[str, Any]:
    """The means since the last log line; raises ``CommandError`` if the loss has exploded."""
    means = run.interval_meter.read()
    if not math.isfinite(means["loss"]):
        raise parallel.agreed(
            f"the loss is {means['loss']} at step {run.step}: try a smaller --lr than"
            f" {run.config.lr:g}, or a longer --warmup"
        )
    return means


def end_epoch(
    run: Run,
    progress: Progress,
    record: Callable[[dict[str, Any]], None],
    held_out: dict[str, Any],
) -> None:
    """Logs the epoch and moves on to the next."""
    finite(run)
    means = run.epoch_meter.read()
    names = ("accuracy", "cross_entropy", "confidence")
    entry = {
        "kind": "epoch",
        "epoch": run.epoch + 1,
        "step": run.step,
        **means,
        "held_out": {name: [row[name] for row in held_out["exits"]] for name in names},
        "seconds": run.seconds,
        "rows_per_second": run.step * run.config.batch_size * run.config.accumulate / run.seconds,
    }
    record(entry)
    progress.end_epoch(entry, run.config.epochs)
    run.epoch, run.batch = run.epoch + 1, 0
    run.epoch_meter.clear()


class Clock:
    """Adds the time that training takes, and only that, to ``run.seconds``."""

    def __init__(self, run: Run) -> None:
        self.run, self.lap_seconds, self.lap_step = run, run.seconds, run.step
        self.start()

    def start(self) -> None:
        self.since = time.perf_counter()

    def stop(self) -> None:
        now = time.perf_counter()
        self.run.seconds += now - self.since
        self.since = now

    def lap(self) -> float:
        """Rows per second since the lap before."""
        self.stop()
        config = self.run.config
        rows = (self.run.step - self.lap_step) * config.batch_size * config.accumulate
        rate = rows / (self.run.seconds - self.lap_seconds)
        self.lap_seconds, self.lap_step = self.run.seconds, self.run.step
        return rate


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise CommandError(f"{path}: not a JSON file") from None


def write_json(path: Path, value: dict[str, Any]) -> None:
    text = json.dumps(value, indent=2) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))

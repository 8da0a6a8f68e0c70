# SPDX-License-Identifier: Apache-2.0
"""``msdkern train``: options in, a trained folder and a table out."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from msdkern.cli import CommandError
from msdkern.train.config import TrainConfig, add_config_arguments, given_options, resume_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--resume", action="store_true", help="continue the run in --out")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument(
        "--profile-loss",
        action="store_true",
        help="train nothing: say what share of a step the loss takes, and took in plain PyTorch",
    )
    add_config_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Train, then print the table of the exits and draw the pictures."""
    given = given_options(args)
    if args.profile_loss:
        from msdkern.train.profile import profile_loss, profile_table

        shares = profile_loss(TrainConfig(**given))
        print(profile_table(shares))
        if args.json:
            print(json.dumps(shares))
        return 0
    from msdkern.train import parallel
    from msdkern.train.loop import fit

    with parallel.process_group(given.get("device", "auto")):
        config = parallel.first(lambda: choose_config(given, args.resume))
        report = fit(config, args.resume)
        if parallel.rank() == 0:
            say(config, draw(config))
            print_report(report, args.json)
    return 0


def choose_config(given: dict[str, Any], resume: bool) -> TrainConfig:
    """Defaults, or the config of the run that is resumed, with the given options."""
    from msdkern.train.loop import stored_config

    config = TrainConfig(**given)
    folder = Path(config.out) if config.out else default_folder(config, resume)
    stored = stored_config(folder) if resume else None
    if stored is not None:
        return replace(resume_config(stored, given), out=str(folder))
    if resume:
        say(config, f"{folder}: nothing to resume yet, starting from the beginning")
    return replace(config, out=str(folder))


def default_folder(config: TrainConfig, resume: bool) -> Path:
    """``runs/DATA-MODEL-LOSS-SEED``, numbered so that no run is in the way of another."""
    base = Path("runs") / f"{config.data}-{config.model}-{config.loss}-seed{config.seed}"
    numbered = [base, *(base.with_name(f"{base.name}-{n}") for n in range(2, 10000))]
    free = next((n for n, folder in enumerate(numbered) if not folder.exists()), None)
    if free is None:
        raise CommandError(f"--out: {base} and its numbered neighbours exist already; name another")
    return numbered[max(free - 1, 0) if resume else free]


def draw(config: TrainConfig) -> str:
    """Draws both pictures beside the checkpoints, and says where, or why not."""
    from msdkern.train.log import read_log
    from msdkern.train.loop import read_json
    from msdkern.train.report import draw_cost, draw_curves, missing_matplotlib

    sentence = missing_matplotlib()
    if sentence is not None:
        return sentence
    folder = Path(config.out)
    title = f"{config.model} on {config.data}, loss {config.loss}"
    draw_cost(read_json(folder / "result.json"), title, folder / "accuracy.png")
    draw_curves(read_log(folder / "log.jsonl"), title, folder / "curves.png")
    return f"pictures: {folder / 'accuracy.png'}, {folder / 'curves.png'}"


def print_report(report: dict[str, Any], as_json: bool) -> None:
    """The table on standard output, and with --json the report as the last line."""
    from msdkern.train.report import table

    print(table(report))
    if as_json:
        print(json.dumps(report))
    sys.stdout.flush()


def say(config: TrainConfig, text: str) -> None:
    if not config.quiet:
        print(text, file=sys.stderr, flush=True)

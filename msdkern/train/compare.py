# SPDX-License-Identifier: Apache-2.0
"""``msdkern compare``: several losses over several seeds, as a table, JSON and a picture."""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from msdkern.cli import CommandError
from msdkern.train.config import (
    TrainConfig,
    add_config_arguments,
    given_options,
    resume_config,
)

MEASURES = ("accuracy", "cross_entropy", "confidence")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "Every run has a folder of its own in --out. The same command, given again, continues"
        " where it was stopped and leaves finished runs alone."
    )
    parser.add_argument(
        "--losses",
        default="ce,msd",
        metavar="NAMES",
        help="losses with commas between; msd:alpha=0.3:temperature=2 sets options of one"
        " (default: ce,msd)",
    )
    parser.add_argument(
        "--seeds", default="0,1,2", metavar="NUMBERS", help="seeds (default: 0,1,2)"
    )
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    add_config_arguments(parser, leave_out=("loss", "seed"))


def run(args: argparse.Namespace) -> int:
    """Train what is missing, then print and write the comparison."""
    base = TrainConfig(**given_options(args))
    base = replace(base, out=base.out or f"runs/compare-{base.data}-{base.model}")
    losses, seeds = parse_losses(args.losses), parse_seeds(args.seeds)
    folder = Path(base.out)
    plan = {
        spec: [
            run_config(base, spec, seed, folder / f"{folder_name(spec)}-seed{seed}")
            for seed in seeds
        ]
        for spec in losses
    }
    check_losses(plan)
    reports = {spec: [train(config) for config in configs] for spec, configs in plan.items()}
    summary = summarise(reports, seeds)
    text = markdown(summary)
    write(folder, summary, text, f"{base.model} on {base.data}")
    print(text)
    if args.json:
        print(json.dumps(summary))
    sys.stdout.flush()
    return 0


def parse_losses(text: str) -> list[str]:
    """``ce,msd:alpha=0.3`` as a list of specifications, none twice."""
    specs = [part.strip() for part in text.split(",") if part.strip()]
    if not specs or len(set(specs)) < len(specs):
        raise CommandError(f"--losses: must name losses, none of them twice; got {text!r}")
    return specs


def parse_seeds(text: str) -> list[int]:
    """``0,1,2`` as numbers, none twice."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() for word in words) or len(set(words)) < len(words):
        raise CommandError(f"--seeds: must be numbers such as 0,1,2, none twice; got {text!r}")
    return [int(word) for word in words]


def folder_name(spec: str) -> str:
    """A specification as part of a file name."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", spec)


def run_config(base: TrainConfig, spec: str, seed: int, folder: Path) -> TrainConfig:
    """The config of one run; one that is in ``folder`` already must agree with it."""
    from msdkern.train.loop import stored_config

    loss, *options = spec.split(":")
    config = replace(
        base,
        loss=loss,
        loss_option=(*base.loss_option, *options),
        seed=seed,
        out=str(folder),
    )
    stored = stored_config(folder)
    if stored is None:
        return config
    try:
        return resume_config(
            stored, {item.name: getattr(config, item.name) for item in fields(config)}
        )
    except CommandError as error:
        raise CommandError(f"{folder}: {error}; choose another --out") from None


def check_losses(plan: dict[str, list[TrainConfig]]) -> None:
    """Raises for a loss that cannot be trained with, before hours go into the others."""
    from msdkern.train.run import build_criterion

    for configs in plan.values():
        build_criterion(configs[0], exits=3)


def train(config: TrainConfig) -> dict[str, Any]:
    """One run, continued or new; a finished one only returns its report."""
    from msdkern.train.loop import fit

    if not config.quiet:
        print(f"{config.out}:", file=sys.stderr, flush=True)
    return fit(config, resume=True)


def summarise(reports: dict[str, list[dict[str, Any]]], seeds: list[int]) -> dict[str, Any]:
    """Mean and spread (sample standard deviation, None for one seed) over the seeds.

    Returns ``{"seeds": [...], "losses": {name: [{"exit", "madds", "accuracy": {"mean", "spread",
    "values"}, "cross_entropy": ..., "confidence": ...}, ...]}, "seconds": total}``.
    """
    losses = {}
    for name, runs in reports.items():
        rows = []
        for exits in zip(*(report["exits"] for report in runs), strict=True):
            values = {m: [row[m] for row in exits] for m in MEASURES}
            facts = {m: mean_and_spread(values[m]) for m in MEASURES}
            rows.append({"exit": exits[0]["exit"], "madds": exits[0]["madds"], **facts})
        losses[name] = rows
    seconds = sum(report["seconds"] for runs in reports.values() for report in runs)
    return {"seeds": seeds, "losses": losses, "seconds": seconds}


def mean_and_spread(values: list[float]) -> dict[str, Any]:
    spread = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "spread": spread, "values": values}


def markdown(summary: dict[str, Any]) -> str:
    """Two Markdown tables: accuracy and cross entropy of every loss at every exit."""
    from msdkern.train.report import count

    seeds = summary["seeds"]
    over = f"over {len(seeds)} seeds, mean ± standard deviation" if len(seeds) > 1 else "one seed"
    first = next(iter(summary["losses"].values()))
    lines = []
    for measure, title, scale, digits in (
        ("accuracy", "Held-out accuracy in %", 100, 2),
        ("cross_entropy", "Held-out cross entropy", 1, 4),
    ):
        heads = [f"exit {row['exit']} ({count(row['madds'])})" for row in first]
        table = [["loss", *heads]] + [
            [name, *(cell(row[measure], scale, digits) for row in rows)]
            for name, rows in summary["losses"].items()
        ]
        lines += [f"{title}, {over}; multiply-adds in brackets:", "", *markdown_table(table), ""]
    return "\n".join(lines).rstrip()


def cell(fact: dict[str, Any], scale: float, digits: int) -> str:
    text = f"{scale * fact['mean']:.{digits}f}"
    return text if fact["spread"] is None else f"{text} ± {scale * fact['spread']:.{digits}f}"


def markdown_table(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    return [lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]]


def write(folder: Path, summary: dict[str, Any], text: str, title: str) -> None:
    """``compare.json``, ``compare.md`` and ``compare.png`` in ``folder``."""
    from msdkern.train.files import write_atomically
    from msdkern.train.loop import write_json
    from msdkern.train.report import missing_matplotlib

    write_json(folder / "compare.json", summary)
    write_atomically(folder / "compare.md", lambda file: file.write(f"{text}\n".encode()))
    sentence = missing_matplotlib()
    if sentence is None:
        draw(summary, title, folder / "compare.png")
        sentence = f"picture: {folder / 'compare.png'}"
    print(sentence, file=sys.stderr)


def draw(summary: dict[str, Any], title: str, path: Path) -> None:
    """Accuracy against multiply-adds, one line per loss; bars are the spread over the seeds."""
    from msdkern.train.report import COLOURS, cost_axes, picture

    losses = summary["losses"]
    with picture(path, 6.8, 4.6) as (axes,):
        every_cost, every_accuracy = [], []
        for place, (name, rows) in enumerate(losses.items()):
            # A little aside, so that the bars of two losses do not hide each other.
            aside = 0.012 * rows[-1]["madds"] * (place - (len(losses) - 1) / 2)
            cost = [row["madds"] + aside for row in rows]
            colour = COLOURS[place % len(COLOURS)]
            mean = [100 * row["accuracy"]["mean"] for row in rows]
            spread = [100 * (row["accuracy"]["spread"] or 0) for row in rows]
            axes.errorbar(
                cost, mean, spread, color=colour, marker="o", elinewidth=1.2, capsize=3, label=name
            )
            every_cost += cost
            every_accuracy += [m + s for m, s in zip(mean, spread, strict=True)]
            every_accuracy += [m - s for m, s in zip(mean, spread, strict=True)]
        cost_axes(axes, every_cost, every_accuracy)
        axes.set_title(title)
        axes.figure.legend(loc="outside lower center", ncols=min(len(losses), 4))

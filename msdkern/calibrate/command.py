# SPDX-License-Identifier: Apache-2.0
"""``msdkern calibrate``: temperatures and thresholds from rows set aside, and what they buy."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msdkern.cli import CommandError
from msdkern.train.options import add_batch_size, add_checkpoint_arguments, given_fields

if TYPE_CHECKING:
    from torch import Tensor

    from msdkern.calibrate.files import Thresholds
    from msdkern.infer.evaluation import Scores
    from msdkern.train.evaluate import Trained

METHODS = ("accuracy", "match", "budgeted", "risk")
MEASURES = ("confidence", "margin", "normalized_entropy", "entropy", "max_logit")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint_arguments(parser)
    options: tuple[tuple[str, dict[str, Any]], ...] = (
        ("method", {"choices": METHODS, "default": "accuracy",
                    "help": "accuracy: the most within --budget; match: the cheapest expected to"
                            " lose at most --max-loss; budgeted: the shares of --ratio, as MSDNet"
                            " does; risk: at most --max-loss lost but for a chance of --delta"}),
        ("budget", {"type": float, "default": 0.75,
                    "help": "mean multiply-adds of a row, as a share of the whole network's"}),
        ("ratio", {"type": float, "default": 1.0, "help": "of the shares of neighbouring exits"}),
        ("max-loss", {"type": float, "default": 0.01, "help": "share of the rows lost at most"}),
        ("delta", {"type": float, "default": 0.05, "help": "probability that more is lost"}),
        ("measure", {"choices": MEASURES, "default": "confidence", "help": "what is compared"}),
        ("out", {"help": "the file to write (default: thresholds.json beside the checkpoint)"}),
    )  # fmt: skip
    for name, settings in options:
        parser.add_argument(f"--{name}", **settings)
    parser.add_argument("--no-temperature", action="store_true", help="take the logits as they are")
    add_batch_size(parser)


def run(args: argparse.Namespace) -> int:
    """Calibrate, write the file, and print what it gives on rows that it was not made from."""
    from msdkern.calibrate import sets
    from msdkern.infer import evaluation
    from msdkern.train.evaluate import opened

    path = Path(args.checkpoint)
    out = Path(args.out) if args.out else path.with_name("thresholds.json")
    with opened(path, given_fields(args)) as trained:
        report = calibrate(trained, args, out)
    if report["calibrated_on"] == "held-out":
        print(f"msdkern calibrate: {sets.SEEN}", file=sys.stderr)
    print(table(report))
    print(evaluation.table(report))
    print(f"thresholds: {out}")
    if args.json:
        print(json.dumps({**report, "checkpoint": str(path)}))
    sys.stdout.flush()
    return 0


def calibrate(trained: Trained, args: argparse.Namespace, out: Path) -> dict[str, Any]:
    """Temperatures and thresholds from the rows that training set aside, the report from others:
    no number is read off the rows that it was fitted to."""
    from msdkern.calibrate import files, sets, thresholds
    from msdkern.infer import evaluation

    parts = sets.sets_of(trained.dataset, apart=args.method == "risk")
    base = evaluation.unfitted(trained, parts, args.measure, not args.no_temperature)
    scores = evaluation.scores_of(trained, parts.thresholds, base)
    found = choose(args, base, scores, parts.source)
    predicted = thresholds.outcome(
        scores.score, scores.correct, found.thresholds, scores.madds, lowest=scores.lowest
    )
    names = ("accuracy", "madds", "share")
    plain = {name: value.tolist() for name, value in zip(names, predicted, strict=True)}
    found = replace(found, predicted=plain)
    files.save(out, found)
    early = {evaluation.FILE: found}
    report = evaluation.early_report(trained, parts, early, batch_size=args.batch_size)
    return {**report, "predicted": plain, "file": str(out)}


def choose(args: argparse.Namespace, base: Thresholds, scores: Scores, source: str) -> Thresholds:
    """Thresholds by the method that was asked for."""
    from msdkern.infer import evaluation

    if args.method == "accuracy":
        return evaluation.within_budget(base, scores, args.budget, source)
    if args.method == "risk" and args.measure in ("entropy", "max_logit"):
        rule = "--measure: must lie between 0 and 1 for --method risk"
        raise CommandError(f"{rule}; got {args.measure}")
    try:
        limits, words = BY[args.method](args, scores)
    except ValueError as error:
        raise CommandError(str(error)) from None
    method = {"name": args.method, **words, "rows": source}
    return replace(base, thresholds=tuple(limits.tolist()), method=method)


def by_match(args: argparse.Namespace, scores: Scores) -> tuple[Tensor, dict[str, Any]]:
    from msdkern.calibrate import match

    found = match.match_accuracy(
        scores.score, scores.correct, scores.madds, args.max_loss, lowest=scores.lowest
    )
    budget = found.budget / scores.madds[-1]
    return found.thresholds, {"max_loss": args.max_loss, "loss": found.loss, "budget": budget}


def by_shares(args: argparse.Namespace, scores: Scores) -> tuple[Tensor, dict[str, Any]]:
    from msdkern.calibrate import thresholds

    shares = thresholds.geometric_fractions(len(scores.madds), args.ratio)
    limits = thresholds.budgeted_thresholds(scores.score, shares, lowest=scores.lowest)
    return limits, {"ratio": args.ratio}


def by_risk(args: argparse.Namespace, scores: Scores) -> tuple[Tensor, dict[str, Any]]:
    from msdkern.calibrate import risk

    found = risk.risk_controlled_thresholds(
        scores.score, scores.correct, args.max_loss, args.delta, lowest=scores.lowest
    )
    words = {"max_loss": args.max_loss, "delta": args.delta, "loss": found.loss,
             "upper_bound": found.upper_bound, "tested": found.tested}  # fmt: skip
    return found.thresholds, words


# Methods that name thresholds and say in words how these were found.
BY = {"match": by_match, "budgeted": by_shares, "risk": by_risk}


def table(report: dict[str, Any]) -> str:
    """One line per exit: what it knows, what it costs, how honest it is, who leaves there."""
    from msdkern.train.report import aligned, count

    headings = ("exit", "accuracy", "multiply-adds", "ms", "temperature", "ECE", "before",
                "threshold", "leave")  # fmt: skip
    rows = [headings]
    [found] = report["early"]
    columns = (report["exits"], found["thresholds"], found["share"])
    for row, threshold, share in zip(*columns, strict=True):
        last = row["exit"] == len(report["exits"])
        off = abs(threshold) >= 1e8
        rows.append(
            (
                str(row["exit"]),
                f"{100 * row['accuracy']:.2f} %",
                count(row["madds"]),
                f"{row['milliseconds']:.3g}",
                f"{row['temperature']:.3f}",
                f"{row['ece']:.4f}",
                f"{row['ece_uncalibrated']:.4f}",
                "always" if last else "never" if off else f"{threshold:.4f}",
                f"{100 * share:.1f} %",
            )
        )
    return "\n".join(aligned(rows))

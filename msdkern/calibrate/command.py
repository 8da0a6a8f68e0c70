# SPDX-License-Identifier: Apache-2.0
"""``msdkern calibrate``: temperatures and thresholds from held-out rows, and what they buy."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msdkern.cli import CommandError

if TYPE_CHECKING:
    from torch import Tensor

    from msdkern.train.data import Rows
    from msdkern.train.evaluate import Trained

METHODS = ("accuracy", "budgeted", "risk")
MEASURES = ("confidence", "margin", "normalized_entropy", "entropy", "max_logit")
SPLIT_SEED = 1  # of the held-out rows into three parts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="a checkpoint of msdkern train, such as last.pt")
    options: tuple[tuple[str, dict[str, Any]], ...] = (
        ("method", {"choices": METHODS, "default": "accuracy",
                    "help": "accuracy: the most within --budget; budgeted: the shares of --ratio,"
                            " as MSDNet does; risk: at most --max-loss lost"}),
        ("budget", {"type": float, "default": 0.75,
                    "help": "mean multiply-adds of a row, as a share of the whole network's"}),
        ("ratio", {"type": float, "default": 1.0, "help": "of the shares of neighbouring exits"}),
        ("max-loss", {"type": float, "default": 0.01, "help": "accuracy that may be lost"}),
        ("delta", {"type": float, "default": 0.05, "help": "probability that more is lost"}),
        ("measure", {"choices": MEASURES, "default": "confidence", "help": "what is compared"}),
        ("out", {"help": "the file to write (default: thresholds.json beside the checkpoint)"}),
    )  # fmt: skip
    for name, settings in options:
        parser.add_argument(f"--{name}", **settings)
    parser.add_argument("--no-temperature", action="store_true", help="take the logits as they are")
    for name, text in (
        ("root", "folder of the images, if they have moved"),
        ("device", "cpu, cuda, ...; auto takes a GPU if there is one"),
        ("executor", "who computes: auto, eager, cpu, ..."),
    ):
        parser.add_argument(f"--{name}", default=argparse.SUPPRESS, help=text)
    parser.add_argument("--threads", type=int, default=argparse.SUPPRESS, help="CPU threads")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")


def run(args: argparse.Namespace) -> int:
    """Calibrate, write the file, print the table and draw the pictures."""
    from msdkern.calibrate.plots import draw
    from msdkern.infer.measure import sentence
    from msdkern.train.evaluate import given_fields, opened

    path = Path(args.checkpoint)
    out = Path(args.out) if args.out else path.with_name("thresholds.json")
    with opened(path, given_fields(args)) as trained:
        report = calibrate(trained, args, out)
    print(table(report))
    print(sentence(report["adaptive"]))
    print(f"thresholds: {out}")
    print(draw(report, out.parent), file=sys.stderr)
    if args.json:
        print(json.dumps({**report, "checkpoint": str(path)}))
    sys.stdout.flush()
    return 0


def calibrate(trained: Trained, args: argparse.Namespace, out: Path) -> dict[str, Any]:
    """Temperatures from a third of the held-out rows, thresholds from another, the report from
    the last: no number is read off the rows that it was fitted to."""
    from msdkern import models
    from msdkern.calibrate import files, temperature, thresholds
    from msdkern.infer import AdaptiveRunner, measure

    first, second, third = parts(trained.dataset.held_out)
    z, labels = logits_of(trained, first)
    exits = trained.model.exits
    t = [1.0] * exits if args.no_temperature else temperature.fit_temperature(z, labels).tolist()
    madds = [float(m) for m in models.multiply_adds(trained.model, trained.dataset.input_shape)]
    z, labels = logits_of(trained, second)
    score, prediction = thresholds.exit_scores(z, args.measure, temperature=t)
    limits, method = choose(args, score, prediction == labels, madds)
    low = args.measure.endswith("entropy")
    predicted = thresholds.outcome(score, prediction == labels, limits, madds, lowest=low)
    found = files.Thresholds(
        measure=args.measure,
        thresholds=tuple(limits.tolist()),
        temperature=tuple(t),
        model=files.model_fingerprint(trained.model),
        data=trained.dataset.fingerprint,
        method=method,
        predicted=dict(zip(("accuracy", "madds", "share"), map(_plain, predicted), strict=True)),
    )
    files.save(out, found)
    batches = measure.batches_of(trained, third)
    z, labels = logits_of(trained, third)
    runner = AdaptiveRunner(trained.model, found, madds=madds)
    adaptive = measure.answer(runner, batches)
    milliseconds = measure.stage_milliseconds(trained, batches)
    adaptive["whole"] = {"madds": madds[-1], "milliseconds": milliseconds[-1]}
    return {
        "exits": exit_rows(z, labels, t, madds, milliseconds),
        "adaptive": adaptive,
        "predicted": found.predicted,
        "curve": curve(trained, args, (score, prediction, second), (z, labels), t, madds, batches),
        "method": method,
        "measure": args.measure,
        "thresholds": list(found.thresholds),
        "reliability": reliability_rows(z, labels, t),
        "file": str(out),
    }


def _plain(value: Any) -> Any:
    return value.tolist()


def parts(rows: Rows) -> list[Rows]:
    """Three parts that share no row, always the same."""
    from msdkern.train.batches import generator_for
    from msdkern.train.data import Rows

    if len(rows) < 3:
        raise CommandError(f"calibrate: needs at least 3 held-out rows; got {len(rows)}")
    import torch

    order = torch.randperm(len(rows), generator=generator_for(SPLIT_SEED))
    return [Rows(rows.images[i], rows.labels[i]) for i in order.tensor_split(3)]


def logits_of(trained: Trained, rows: Rows) -> tuple[Tensor, Tensor]:
    """[K, n, C] of all exits, and the labels."""
    import torch

    from msdkern.infer.measure import batches_of

    with torch.no_grad():
        found = [
            (torch.stack(trained.model(images)), labels)
            for images, labels in batches_of(trained, rows)
        ]
    return torch.cat([z for z, _ in found], 1), torch.cat([y for _, y in found])


def choose(
    args: argparse.Namespace, score: Tensor, correct: Tensor, madds: list[float]
) -> tuple[Tensor, dict[str, Any]]:
    """Thresholds by the method that was asked for, and the words for the file."""
    from msdkern.calibrate import risk, solve, thresholds

    low, exits = args.measure.endswith("entropy"), len(madds)
    try:
        if args.method == "budgeted":
            fractions = thresholds.geometric_fractions(exits, args.ratio)
            limits = thresholds.budgeted_thresholds(score, fractions, lowest=low)
            return limits, {"name": "budgeted", "ratio": args.ratio}
        if args.method == "accuracy":
            budget = args.budget * madds[-1]
            limits, _ = solve.maximize_accuracy(score, correct, madds, budget, lowest=low)
            return limits, {"name": "accuracy", "budget": args.budget}
        if args.measure in ("entropy", "max_logit"):
            rule = "--measure: must lie between 0 and 1 for --method risk"
            raise CommandError(f"{rule}; got {args.measure}")
        found = risk.risk_controlled_thresholds(
            score, correct, args.max_loss, args.delta, lowest=low
        )
        words = {"max_loss": args.max_loss, "delta": args.delta, "loss": found.loss,
                 "upper_bound": found.upper_bound, "tested": found.tested}  # fmt: skip
        return found.thresholds, {"name": "risk", **words}
    except ValueError as error:
        raise CommandError(str(error)) from None


def exit_rows(
    z: Tensor, labels: Tensor, t: list[float], madds: list[float], milliseconds: list[float]
) -> list[dict[str, Any]]:
    """Per exit: accuracy and cost, and calibration before and after its temperature."""
    from msdkern.calibrate import metrics, thresholds

    columns: dict[str, list[float]] = {"temperature": t, "madds": madds}
    columns["milliseconds"] = milliseconds
    for name, own in (("", t), ("_uncalibrated", [1.0] * len(t))):
        score, prediction = thresholds.exit_scores(z, temperature=own)
        right = prediction == labels
        scaled = [x / temperature for x, temperature in zip(z.float(), own, strict=True)]
        columns["accuracy"] = right.double().mean(1).tolist()
        columns[f"ece{name}"] = metrics.expected_calibration_error(score, right).tolist()
        columns[f"nll{name}"] = metrics.negative_log_likelihood(scaled, labels).tolist()
        columns[f"brier{name}"] = metrics.brier_score(scaled, labels).tolist()
    return [
        {"exit": k + 1, **{name: values[k] for name, values in columns.items()}}
        for k in range(len(t))
    ]


def reliability_rows(z: Tensor, labels: Tensor, t: list[float]) -> dict[str, Any]:
    from msdkern.calibrate import metrics, thresholds

    score, prediction = thresholds.exit_scores(z, temperature=t)
    bins = metrics.reliability(score, prediction == labels, bins=10)
    return {name: _plain(getattr(bins, name)) for name in bins._fields}


def curve(
    trained: Trained,
    args: argparse.Namespace,
    chosen_on: tuple[Tensor, Tensor, Rows],
    shown_on: tuple[Tensor, Tensor],
    t: list[float],
    madds: list[float],
    batches: list[tuple[Tensor, Tensor]],
) -> list[dict[str, Any]]:
    """The 39 settings of the public procedure: accuracy and multiply-adds on fresh rows."""
    import torch

    from msdkern.calibrate import thresholds
    from msdkern.infer import AdaptiveRunner, measure

    low, exits = args.measure.endswith("entropy"), len(madds)
    ratios = [p / 20 for p in range(1, 40)]
    fractions = torch.stack([thresholds.geometric_fractions(exits, r) for r in ratios])
    limits = thresholds.budgeted_thresholds(chosen_on[0], fractions, lowest=low)
    score, prediction = thresholds.exit_scores(shown_on[0], args.measure, temperature=t)
    found = thresholds.outcome(score, prediction == shown_on[1], limits, madds, lowest=low)
    points = []
    for i, ratio in enumerate(ratios):
        point = {"ratio": ratio, "accuracy": float(found.accuracy[i])}
        points.append({**point, "madds": float(found.cost[i])})
    for i in range(0, len(ratios), 4):  # time is measured at every fourth
        runner = AdaptiveRunner(trained.model, limits[i], args.measure, temperature=t)
        points[i]["milliseconds"] = measure.answer(runner, batches)["milliseconds"]
    return points


def table(report: dict[str, Any]) -> str:
    """One line per exit: what it knows, what it costs, how honest it is, who leaves there."""
    from msdkern.train.report import aligned, count

    headings = ("exit", "accuracy", "multiply-adds", "ms", "temperature", "ECE", "before",
                "threshold", "leave")  # fmt: skip
    rows = [headings]
    columns = (report["exits"], report["thresholds"], report["adaptive"]["share"])
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

# SPDX-License-Identifier: Apache-2.0
"""What thresholds buy on rows that did not choose them: the report of calibrate and evaluate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from msdkern import models
from msdkern.calibrate import files, metrics, solve, temperature, thresholds
from msdkern.calibrate.files import Thresholds
from msdkern.calibrate.sets import Sets, logits_of, sets_of
from msdkern.cli import CommandError
from msdkern.infer import measure
from msdkern.infer.budgeted import AdaptiveRunner
from msdkern.train.data import Rows
from msdkern.train.report import aligned, count

if TYPE_CHECKING:
    from msdkern.train.evaluate import Trained

RATIOS = [p / 20 for p in range(1, 40)]  # of the public procedure's curve
TIMED = 4  # time is measured at every fourth of them
BINS = 10  # of the reliability diagrams
FILE, BUDGET = "thresholds", "budget"  # how ways to leave early are called


class Scores(NamedTuple):
    """Of the rows that choose thresholds: score [K, n], correct [K, n]; cost [K] of an exit."""

    score: Tensor
    correct: Tensor
    madds: list[float]
    lowest: bool  # a gate fires at scores below its threshold


def scores_of(trained: Trained, rows: Rows, base: Thresholds) -> Scores:
    """What the gates of ``base`` see of these rows."""
    z, labels = logits_of(trained, rows)
    score, prediction = thresholds.exit_scores(z, base.measure, temperature=base.temperature)
    return Scores(score, prediction == labels, costs(trained), base.measure.endswith("entropy"))


def costs(trained: Trained) -> list[float]:
    """Multiply-adds of one image up to each exit."""
    return [float(m) for m in models.multiply_adds(trained.model, trained.dataset.input_shape)]


def unfitted(trained: Trained, sets: Sets, measure: str, scaled: bool = True) -> Thresholds:
    """Thresholds that nobody passes, with the temperatures of these rows (all 1 unless scaled)."""
    exits = trained.model.exits
    t = [1.0] * exits
    if scaled:
        t = temperature.fit_temperature(*logits_of(trained, sets.temperature)).tolist()
    low = -1 if measure.endswith("entropy") else 1
    never = [low * thresholds.DISABLED] * (exits - 1) + [-low * thresholds.DISABLED]
    model = files.model_fingerprint(trained.model)
    return Thresholds(measure, tuple(never), tuple(t), model, trained.dataset.fingerprint)


def within_budget(base: Thresholds, scores: Scores, budget: float, source: str) -> Thresholds:
    """The most accurate thresholds whose rows cost at most ``budget`` of the whole network.

    Raises ``CommandError`` when no thresholds do.
    """
    try:
        limits, _ = solve.maximize_accuracy(
            scores.score, scores.correct, scores.madds, budget * scores.madds[-1],
            lowest=scores.lowest,
        )  # fmt: skip
    except ValueError as error:
        raise CommandError(str(error)) from None
    method = {"name": "accuracy", "budget": budget, "rows": source}
    return replace(base, thresholds=tuple(limits.tolist()), method=method)


def public_curve(base: Thresholds, scores: Scores) -> list[Thresholds]:
    """The thresholds of the public procedure, one setting for every ratio."""
    exits = len(scores.madds)
    shares = torch.stack([thresholds.geometric_fractions(exits, ratio) for ratio in RATIOS])
    limits = thresholds.budgeted_thresholds(scores.score, shares, lowest=scores.lowest)
    return [
        replace(base, thresholds=tuple(row), method={"name": "budgeted", "ratio": ratio})
        for row, ratio in zip(limits.tolist(), RATIOS, strict=True)
    ]


def evaluate_early(
    trained: Trained, path: str, budgets: Sequence[float], batch_size: int
) -> dict[str, Any]:
    """Leaving early by the file at ``path`` ("": none), and within each of the budgets.

    Budgets take measure and temperatures from the file; without one these are the confidence and
    temperatures fitted here. With budgets comes the curve of the public procedure.

    Raises ``CommandError`` for a file that belongs to another model or data set.
    """
    sets = sets_of(trained.dataset)
    if path:
        base = files.load(path, trained.model, trained.dataset.fingerprint)
    else:
        base = unfitted(trained, sets, "confidence")
    early = {FILE: base} if path else {}
    if not budgets:
        return early_report(trained, sets, early, batch_size=batch_size)
    scores = scores_of(trained, sets.thresholds, base)
    for budget in budgets:
        early[f"{BUDGET} {budget:g}"] = within_budget(base, scores, budget, sets.source)
    return early_report(trained, sets, early, public_curve(base, scores), batch_size)


def early_report(
    trained: Trained,
    sets: Sets,
    early: Mapping[str, Thresholds],
    curve: Sequence[Thresholds] = (),
    batch_size: int = measure.BATCH_SIZE,
) -> dict[str, Any]:
    """Every exit, and leaving early by each of the thresholds, on the rows that report.

    All share measure and temperatures. ``curve`` is computed from logits, and timed here and there.
    """
    rows = sets.report
    z, labels = logits_of(trained, rows)
    base, madds = next(iter(early.values())), costs(trained)
    batches = measure.batches_of(trained, rows, batch_size)
    timed = list(range(0, len(curve), TIMED))
    used = [*early.values(), *(curve[i] for i in timed)]
    calls = [measure.leaving_early(AdaptiveRunner(trained.model, found)) for found in used]
    with measure.precision(trained):
        whole, *runs = measure.in_turn([measure.whole_network(trained), *calls], batches)
    results = [measure.summary(run, batches, madds) for run in runs]
    points = curve_points(z, labels, curve, madds)
    for i, result in zip(timed, results[len(early) :], strict=True):
        points[i]["milliseconds"] = result["milliseconds"]
    milliseconds = measure.cumulative_milliseconds(whole, len(rows))
    return {
        "exits": exit_rows(z, labels, base.temperature, madds, milliseconds),
        "early": [
            {"name": name, "method": dict(t.method), "thresholds": list(t.thresholds), **result}
            for (name, t), result in zip(early.items(), results[: len(early)], strict=True)
        ],
        "curve": points,
        "reliability": reliability_rows(z, labels, base.temperature),
        "measure": base.measure,
        "calibrated_on": sets.source,
        "rows": len(rows),
        "batch_size": batch_size,
    }


def curve_points(
    z: Tensor, labels: Tensor, curve: Sequence[Thresholds], madds: list[float]
) -> list[dict[str, Any]]:
    """Accuracy and multiply-adds of every setting."""
    if not curve:
        return []
    base = curve[0]
    score, prediction = thresholds.exit_scores(z, base.measure, temperature=base.temperature)
    limits = torch.tensor([setting.thresholds for setting in curve])
    low = base.measure.endswith("entropy")
    found = thresholds.outcome(score, prediction == labels, limits, madds, lowest=low)
    columns = zip(curve, found.accuracy.tolist(), found.cost.tolist(), strict=True)
    return [{"ratio": s.method["ratio"], "accuracy": a, "madds": m} for s, a, m in columns]


def exit_rows(
    z: Tensor, labels: Tensor, t: Sequence[float], madds: list[float], milliseconds: list[float]
) -> list[dict[str, Any]]:
    """Per exit: accuracy and cost, and calibration before and after its temperature."""
    columns: dict[str, Sequence[float]] = {"temperature": t, "madds": madds}
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


def reliability_rows(z: Tensor, labels: Tensor, t: Sequence[float]) -> dict[str, Any]:
    """Count, confidence and accuracy of every bin of confidence, exit by exit."""
    score, prediction = thresholds.exit_scores(z, temperature=t)
    bins = metrics.reliability(score, prediction == labels, bins=BINS)
    return {name: getattr(bins, name).tolist() for name in bins._fields}


# Text -----------------------------------------------------------------------------------------


def table(report: dict[str, Any]) -> str:
    """One line for the whole network, and one for every way to leave early."""
    headings = ("", "accuracy", "multiply-adds", "ms", "faster", "beside stages", "leave at exit")
    last = report["exits"][-1]
    cells = (f"{100 * last['accuracy']:.2f} %", count(last["madds"]), f"{last['milliseconds']:.3g}")
    rows = [headings, ("whole network", *cells, "1.00x", "0.0 %", "all at the last")]
    for found in report["early"]:
        beside = found["milliseconds"] / found["stage_milliseconds"] - 1
        rows.append(
            (
                found["name"],
                f"{100 * found['accuracy']:.2f} %",
                count(found["madds"]),
                f"{found['milliseconds']:.3g}",
                f"{last['milliseconds'] / found['milliseconds']:.2f}x",
                f"{100 * beside:.1f} %",
                " ".join(f"{100 * share:.0f}" for share in found["share"]) + " %",
            )
        )
    size, repeats = report["batch_size"], measure.REPEATS
    text = f"{report['rows']:,} rows, batches of {size}, the fastest of {repeats} runs in turn"
    return "\n".join([*aligned(rows), text])

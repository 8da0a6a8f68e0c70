# SPDX-License-Identifier: Apache-2.0
"""Pictures of leaving early: accuracy against cost, reliability per exit, who leaves where."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

from msdkern.infer.evaluation import FILE
from msdkern.train.report import (
    COLOURS,
    INK,
    PALE,
    count,
    depth_colours,
    missing_matplotlib,
    note,
    picture,
)

SIDES = (("madds", "multiply-adds of a row"), ("milliseconds", "measured milliseconds of a row"))

FEWEST = 10  # rows of a bin whose accuracy says something


def draw(report: dict[str, Any], folder: Path) -> str:
    """Draws all three into the folder and says where, or why not."""
    sentence = missing_matplotlib()
    if sentence is not None:
        return sentence
    folder.mkdir(parents=True, exist_ok=True)
    for name, drawer in DRAWERS.items():
        drawer(report, folder / name)
    return "pictures: " + ", ".join(str(folder / name) for name in DRAWERS)


def draw_cost(report: dict[str, Any], path: Path) -> None:
    """Accuracy against multiply-adds and against measured time, anytime and budgeted."""
    from matplotlib.ticker import FuncFormatter

    file = [found for found in report["early"] if found["name"] == FILE]
    within = [found for found in report["early"] if found["name"] != FILE]
    lines: tuple[tuple[str, Sequence[dict[str, Any]], dict[str, Any]], ...] = (
        ("anytime: one exit for all", report["exits"], {"color": COLOURS[6], "marker": "o"}),
        ("budgeted: public procedure", report["curve"], {"color": COLOURS[5], "marker": "."}),
        ("best within a budget", within, {"color": COLOURS[0], "marker": "D"}),
        ("thresholds file", file, {"color": COLOURS[1], "marker": "*", "ms": 14}),
    )
    with picture(path, 11, 4.6, columns=2) as axes:
        for side, (key, label) in zip(axes, SIDES, strict=True):
            for name, records, style in lines:
                points = sorted((r for r in records if key in r), key=itemgetter("madds"))
                cost, accuracy = [r[key] for r in points], [100 * r["accuracy"] for r in points]
                if points:
                    side.plot(cost, accuracy, label=name, **style)
            last = report["exits"][-1]
            side.axhline(100 * last["accuracy"], color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
            side.set_xlim(left=0)
            side.set_xlabel(label)
        axes[0].set_ylabel("accuracy in %")
        axes[0].xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))
        # Below both panels: in one of them it would hide points, wherever these fall.
        names = axes[0].get_legend_handles_labels()
        axes[0].figure.legend(*names, loc="outside lower center", ncols=4)
        axes[0].set_title(f"Leaving early, {report['rows']:,} rows")
        axes[1].set_title(f"batches of {report['batch_size']}")


def draw_reliability(report: dict[str, Any], path: Path) -> None:
    """Accuracy by confidence, one panel per exit; the bars are the rows of a bin."""
    bins, exits = report["reliability"], report["exits"]
    with picture(path, max(3.0 * len(exits), 4), 3.3, columns=len(exits)) as axes:
        for side, row, *columns in zip(
            axes, exits, bins["count"], bins["confidence"], bins["accuracy"], strict=True
        ):
            total, width = max(sum(columns[0]), 1), 1 / len(columns[0])
            centres = [width * (b + 0.5) for b in range(len(columns[0]))]
            side.bar(centres, [n / total for n in columns[0]], width * 0.95, color=PALE)
            side.plot([0, 1], [0, 1], color=INK, linewidth=1, linestyle=(0, (4, 3)))
            shown = [(c, a) for n, c, a in zip(*columns, strict=True) if n >= FEWEST]
            line = {"color": COLOURS[0], "marker": "o", "clip_on": False, "zorder": 3}
            side.plot([c for c, _ in shown], [a for _, a in shown], **line)
            side.set_title(f"exit {row['exit']}, ECE {row['ece']:.3f}")
            side.set_xlabel(f"confidence, T = {row['temperature']:.2f}")
            side.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
        axes[0].set_ylabel("accuracy (bars: share of rows)")


def draw_exits(report: dict[str, Any], path: Path) -> None:
    """The share of the rows that each exit answers, one panel for every way to leave early."""
    early = report["early"]
    most = max(100 * share for found in early for share in found["share"])
    with picture(path, max(2.4 * len(early), 4.2), 3.6, columns=len(early)) as axes:
        for side, found in zip(axes, early, strict=True):
            share = [100 * s for s in found["share"]]
            numbers = list(range(1, len(share) + 1))
            side.bar(numbers, share, color=depth_colours(len(share)))
            for x, y in zip(numbers, share, strict=True):
                note(side, f"{y:.0f}", x, y)
            side.set_ylim(0, most * 1.2 + 1)
            side.set_xticks(numbers)
            side.grid(visible=False, axis="x")
            side.set_xlabel("exit")
            side.set_title(f"{found['name']}\n{100 * found['accuracy']:.2f} % right")
        axes[0].set_ylabel("rows that leave there in %")


DRAWERS = {"budgeted.png": draw_cost, "reliability.png": draw_reliability, "exits.png": draw_exits}

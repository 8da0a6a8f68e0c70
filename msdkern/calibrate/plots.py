# SPDX-License-Identifier: Apache-2.0
"""Pictures of a calibration: accuracy against cost, reliability per exit, who leaves where."""

from __future__ import annotations

from operator import itemgetter
from pathlib import Path
from typing import Any

NAMES = ("budgeted.png", "reliability.png", "exits.png")


def draw(report: dict[str, Any], folder: Path) -> str:
    """Draws all three into the folder and says where, or why not."""
    from msdkern.train.report import missing_matplotlib

    sentence = missing_matplotlib()
    if sentence is not None:
        return sentence
    drawers = (draw_cost, draw_reliability, draw_exits)
    for name, drawer in zip(NAMES, drawers, strict=True):
        drawer(report, folder / name)
    return "pictures: " + ", ".join(str(folder / name) for name in NAMES)


def draw_cost(report: dict[str, Any], path: Path) -> None:
    """Accuracy against multiply-adds and against measured time, anytime and budgeted."""
    from matplotlib.ticker import FuncFormatter

    from msdkern.train.report import COLOURS, count, picture

    sides = (
        ("madds", "multiply-adds of a row"),
        ("milliseconds", "measured milliseconds of a row"),
    )
    with picture(path, 10, 4.2, columns=2) as axes:
        for side, (key, label) in zip(axes, sides, strict=True):
            points = [p for p in report["curve"] if key in p]
            points = sorted(points, key=itemgetter(key))
            exits, own = report["exits"], report["adaptive"]
            side.plot([e[key] for e in exits], [100 * e["accuracy"] for e in exits],
                      color=COLOURS[6], marker="o", label="one exit for all rows")  # fmt: skip
            side.plot([p[key] for p in points], [100 * p["accuracy"] for p in points],
                      color=COLOURS[0], marker=".", label="leaving early")  # fmt: skip
            side.plot(own[key], 100 * own["accuracy"], "D", markersize=8, color=COLOURS[1],
                      label="the thresholds of this file")  # fmt: skip
            side.set_xlabel(label)
            side.set_ylabel("accuracy on fresh rows in %")
        axes[0].xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))
        axes[0].legend(loc="lower right")
        axes[0].set_title("What leaving early costs")


def draw_reliability(report: dict[str, Any], path: Path) -> None:
    """Accuracy by confidence, one panel per exit; the bars are the rows of a bin."""
    from msdkern.train.report import COLOURS, INK, PALE, picture

    bins, exits = report["reliability"], report["exits"]
    with picture(path, max(3.2 * len(exits), 4), 3.4, columns=len(exits)) as axes:
        for side, row, *columns in zip(
            axes, exits, bins["count"], bins["confidence"], bins["accuracy"], strict=True
        ):
            total, width = max(sum(columns[0]), 1), 1 / len(columns[0])
            edges = [width * (b + 0.5) for b in range(len(columns[0]))]
            side.bar(edges, [n / total for n in columns[0]], width * 0.95, color=PALE)
            side.plot([0, 1], [0, 1], color=INK, linewidth=1, linestyle=(0, (4, 3)))
            shown = [(c, a) for n, c, a in zip(*columns, strict=True) if n]
            side.plot([c for c, _ in shown], [a for _, a in shown], color=COLOURS[0], marker="o")
            side.set_title(f"exit {row['exit']}, ECE {row['ece']:.3f}")
            side.set_xlabel("confidence")
            side.set_xlim(0, 1)
            side.set_ylim(0, 1)
        axes[0].set_ylabel("accuracy (bars: share of rows)")


def draw_exits(report: dict[str, Any], path: Path) -> None:
    """The share of the rows that each exit answers."""
    from msdkern.train.report import depth_colours, note, picture

    share = [100 * s for s in report["adaptive"]["share"]]
    with picture(path, 4.8, 3.6) as (axes,):
        numbers = list(range(1, len(share) + 1))
        axes.bar(numbers, share, color=depth_colours(len(share)))
        for x, y in zip(numbers, share, strict=True):
            note(axes, f"{y:.1f} %", x, y)
        axes.set_ylim(0, max(share) * 1.2 + 1)
        axes.set_xticks(numbers)
        axes.set_xlabel("exit")
        axes.set_ylabel("rows that leave there in %")
        axes.set_title("Who leaves where")

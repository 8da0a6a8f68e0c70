# SPDX-License-Identifier: Apache-2.0
"""One picture of a results file: how far each contender is from the copy, case by case."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .reading import View, by_family, times_faster
from .report import seconds, where

# kind: (label, colour, size); drawn in this order, msdkern on top.
STYLE = {
    "naive": ("naive PyTorch", "#b9b4ac", 42),
    "eager": ("log-probabilities shared", "#85807a", 42),
    "compiled": ("best torch.compile", "#3b6ea8", 58),
    "msdkern": ("msdkern", "#d1495b", 110),
}
INK, FAINT = "#2b2a28", "#e4e0da"
PHASE = {"loss": "both", "softmax": "both", "statistics": "forward"}
GROUPS = {
    "loss": "Loss and gradient",
    "softmax": "Softmax, forward and backward",
    "statistics": "Exit statistics",
}


def draw(results: dict[str, Any], path: Path) -> None:
    """Writes the picture; the suffix of the path chooses its format.

    Raises: ImportError with one sentence when matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("bench: matplotlib is missing; pip install msdkern[bench]") from error
    groups = {name: by_family(results, name, PHASE[name]) for name in GROUPS}
    rows = sum(len(found) + 1 for found in groups.values() if found)
    figure = Figure(figsize=(10.5, 1.9 + 0.36 * rows), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    lines, height = [], 0.0
    for name, found in groups.items():
        if found:
            axes.text(-0.005, -height, GROUPS[name], weight="bold", **_beside(axes, "right"))
            height += 1
        for view in found:
            _row(axes, view, -height)
            lines.append(view)
            height += 1
    _finish(axes, height, lines)
    _title(axes, results)
    figure.savefig(path, dpi=160)


def _beside(axes: Any, side: str) -> dict[str, Any]:
    """Text placed by row vertically and by the edge of the plot horizontally."""
    common = {"transform": axes.get_yaxis_transform(), "va": "center", "ha": side}
    return {**common, "color": INK, "fontsize": 10}


def _row(axes: Any, view: View, y: float) -> None:
    floor = view.best("floor")
    found = {kind: view.best(kind) for kind in STYLE}
    ratios = {kind: time.median / floor.median for kind, time in found.items() if time and floor}
    if ratios:
        axes.plot([1, max(ratios.values())], [y, y], color=FAINT, lw=2.2, zorder=1)
    for order, (kind, ratio) in enumerate(ratios.items(), 2):
        _, colour, size = STYLE[kind]
        axes.scatter(ratio, y, s=size, color=colour, edgecolors="white", lw=1, zorder=order)
    case = view.case
    axes.text(-0.005, y, f"{case['name']}   {_shape(case)}", **_beside(axes, "right"))
    ours, compiled = view.ours, view.best("compiled")
    faster = f"{times_faster(ours, compiled):>6}" if ours else "left out"
    took = f"{seconds(ours.median):>8}" if ours else ""
    axes.text(1.075, y, faster, weight="bold", **_beside(axes, "right"))
    axes.text(1.175, y, took, **_beside(axes, "right"))


def _shape(case: dict[str, Any]) -> str:
    return f"({case['exits']}, {case['rows']}, {case['classes']})"


def _finish(axes: Any, height: float, lines: list[View]) -> None:
    """Axes: a logarithmic scale of multiples of the copy, and nothing that is not needed."""
    axes.set_xscale("log")
    axes.set_ylim(-height + 0.4, 0.6)
    axes.axvline(1, color=INK, lw=1, zorder=1.5)
    axes.set_yticks([])
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)
    axes.grid(axis="x", which="major", color=FAINT, lw=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.set_xlabel(
        "time, as a multiple of copying the logits through autograd (1x = copy)", color=INK
    )
    axes.tick_params(colors=INK)
    for x, label in ((1.075, "over best\ncompiled"), (1.175, "time\nper call")):
        place = {**_beside(axes, "right"), "va": "bottom", "fontsize": 9}
        axes.text(x, 0.5, label, **place)


def _title(axes: Any, results: dict[str, Any]) -> None:
    for label, colour, size in STYLE.values():
        axes.scatter([], [], s=size, color=colour, label=label, edgecolors="white")
    axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=4, frameon=False, fontsize=9.5)
    software = results["software"]
    text = f"{where(results)}; PyTorch {software['torch']}, msdkern {software['msdkern']}"
    axes.set_title(text, fontsize=9.5, color=INK, loc="left", pad=34)

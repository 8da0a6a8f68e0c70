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
# Columns of text beside the plot, in widths of it.
LEFT, SHAPE, FASTER, TIME = -0.73, -0.03, 1.14, 1.32
HEAD, ROW, FOOT = 1.15, 0.32, 0.95  # inches above, per row, and below
PHASE = {"loss": "both", "softmax": "both", "statistics": "forward", "gate": "forward"}
GROUPS = {
    "loss": "Loss and gradient",
    "softmax": "Softmax, forward and backward",
    "statistics": "Exit statistics",
    "gate": "Gate of one exit",
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
    groups = {name: found for name, found in groups.items() if found}
    rows = sum(len(found) + 1 for found in groups.values())
    height = HEAD + ROW * rows + FOOT
    figure = Figure(figsize=(11, height), facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.36, FOOT / height, 0.47, ROW * rows / height))
    y = 0
    for name, found in groups.items():
        axes.text(LEFT, y, GROUPS[name], **_beside(axes, "left"), weight="bold")
        for view in found:
            y -= 1
            _row(axes, view, y)
        y -= 1
    _finish(axes, y)
    _head(figure, axes, results)
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
    axes.text(LEFT, y, case["name"], **_beside(axes, "left"))
    shape = f"{case['exits']} x {case['rows']} x {case['classes']}"
    axes.text(SHAPE, y, shape, **_beside(axes, "right"))
    ours, compiled = view.ours, view.best("compiled")
    behind = ours is None or (compiled is not None and compiled.median < ours.median)
    place = {**_beside(axes, "right"), "color": STYLE["msdkern"][1] if behind else INK}
    axes.text(FASTER, y, times_faster(ours, compiled), **place, weight="bold")
    axes.text(TIME, y, seconds(ours.median) if ours else "left out", **_beside(axes, "right"))


def _finish(axes: Any, bottom: float) -> None:
    """Axes: a logarithmic scale of multiples of the copy, and nothing that is not needed."""
    axes.set_xscale("log")
    axes.set_ylim(bottom + 0.4, 0.6)
    axes.axvline(1, color=INK, lw=1, zorder=1.5)
    axes.set_yticks([])
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)
    axes.grid(axis="x", which="major", color=FAINT, lw=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.tick_params(colors=INK)
    label = "time of a call, in multiples of the bare copy of its logits (1x = copy, log scale)"
    axes.set_xlabel(label, color=INK)
    for x, text in ((SHAPE, "K x N x C"), (FASTER, "over best\ncompiled"), (TIME, "msdkern")):
        place = {**_beside(axes, "right"), "va": "bottom", "fontsize": 9}
        axes.text(x, 0.6, text, **place)


def _head(figure: Any, axes: Any, results: dict[str, Any]) -> None:
    """The title, where it was measured, and the key."""
    software = results["software"]
    place = f"{where(results)}, PyTorch {software['torch']}, msdkern {software['msdkern']}"
    top = 1 - 0.3 / figure.get_figheight()
    style = {"va": "center", "ha": "left", "color": INK}
    figure.text(0.016, top, "How far from a bare copy", **style, fontsize=14, weight="bold")
    figure.text(0.3, top, place, **style, fontsize=10)
    for label, colour, size in STYLE.values():
        axes.scatter([], [], s=size, color=colour, label=label, edgecolors="white")
    figure.legend(
        loc="lower center",
        bbox_to_anchor=(0.6, 0),
        ncols=4,
        frameon=False,
        fontsize=10,
        labelcolor=INK,
    )

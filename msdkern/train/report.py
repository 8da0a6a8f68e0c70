# SPDX-License-Identifier: Apache-2.0
"""The table at the end of a run, and its two pictures."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from msdkern.train.files import write_atomically

HEADINGS = ("exit", "accuracy", "cross entropy", "confidence", "multiply-adds")


def table(report: dict[str, Any]) -> str:
    """Accuracy, cross entropy, confidence and multiply-adds of every exit, as aligned text."""
    rows = [
        (
            str(row["exit"]),
            f"{100 * row['accuracy']:.2f} %",
            f"{row['cross_entropy']:.4f}",
            f"{row['confidence']:.4f}",
            count(row["madds"]),
        )
        for row in report["exits"]
    ]
    lines = aligned([HEADINGS, *rows])
    text = f"{report['rows']:,} held-out images"
    if "best_accuracy" in report:
        text += f"; no classifier can pass {100 * report['best_accuracy']:.2f} % on average"
    return "\n".join([*lines, text])


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines, every column flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in rows]


def count(value: float) -> str:
    """A large number in three digits: ``12.5 M``."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:g}"


# --- pictures -------------------------------------------------------------------------------

INK, PALE = "#2b2b2b", "#d9d9d9"
STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": PALE,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 4,
    "savefig.dpi": 160,
}
# Distinct for colour-blind readers too; one per compared loss.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#5e5e5e", "#8c6d31")


def missing_matplotlib() -> str | None:
    """None, or the sentence that says which pictures are left out and how to get them."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return "no pictures were drawn: they need matplotlib: pip install 'msdkern[train]'"
    return None


@contextlib.contextmanager
def picture(path: Path, width: float, height: float, columns: int = 1) -> Iterator[list[Any]]:
    """Axes to draw on, from left to right; afterwards ``path`` is a PNG. Opens no window."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield list(figure.subplots(1, columns, squeeze=False)[0])
        write_atomically(path, lambda file: figure.savefig(file, format="png"))


def depth_colours(exits: int) -> list[Any]:
    """From pale to dark with depth: neighbouring exits look alike, the order is seen."""
    import matplotlib

    scale = matplotlib.colormaps["viridis_r"]
    return [scale(0.15 + 0.8 * k / max(exits - 1, 1)) for k in range(exits)]


def draw_cost(report: dict[str, Any], title: str, path: Path) -> None:
    """Accuracy of every exit against the multiply-adds that it costs."""
    exits = report["exits"]
    cost = [row["madds"] for row in exits]
    accuracy = [100 * row["accuracy"] for row in exits]
    with picture(path, 6.4, 4.2) as (axes,):
        axes.plot(cost, accuracy, color="#a8a8a8", linewidth=1.4, zorder=1)
        axes.scatter(cost, accuracy, s=75, c=depth_colours(len(exits)), edgecolor="white", zorder=2)
        for row, x, y in zip(exits, cost, accuracy, strict=True):
            note(axes, f"exit {row['exit']}\n{y:.2f} %", x, y)
        values = list(accuracy)
        if "best_accuracy" in report:
            values.append(100 * report["best_accuracy"])
            axes.axhline(values[-1], color=INK, linewidth=1, linestyle=(0, (4, 3)))
            note(axes, "best possible", cost[0], values[-1])
        cost_axes(axes, cost, values)
        axes.set_title(title)


def note(axes: Any, text: str, x: float, y: float) -> None:
    """Text just above a point."""
    place = {"xytext": (0, 8), "textcoords": "offset points", "ha": "center", "va": "bottom"}
    axes.annotate(text, (x, y), fontsize=10, **place)


def cost_axes(axes: Any, cost: Sequence[float], accuracy: Sequence[float]) -> None:
    """Labels, and limits that leave room for the text above every point."""
    from matplotlib.ticker import FuncFormatter

    axes.set_xlabel("multiply-adds for one image, up to the exit")
    axes.set_ylabel("held-out accuracy in %")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))
    low, high = min(accuracy), max(accuracy)
    span = max(high - low, 1.0)
    axes.set_ylim(low - 0.25 * span, high + 0.35 * span)
    axes.set_yticks([tick for tick in axes.get_yticks() if low - 0.25 * span <= tick <= 100])
    reach = (max(cost) - min(cost)) or max(cost)
    axes.set_xlim(max(0, min(cost) - 0.15 * reach), max(cost) + 0.15 * reach)


def draw_curves(records: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Training loss, and held-out accuracy of every exit, over the epochs."""
    epochs = [record for record in records if record["kind"] == "epoch"]
    if not epochs:
        return
    number = [record["epoch"] for record in epochs]
    with picture(path, 10, 4.2, columns=2) as (left, right):
        loss = [record["loss"] for record in epochs]
        left.plot(number, loss, color=COLOURS[0], marker="o")
        left.set_yscale("log")
        plain_numbers(left.yaxis)
        left.set_ylabel("training loss")
        left.set_title(title)
        accuracy = [[100 * value for value in r["held_out"]["accuracy"]] for r in epochs]
        for k, colour in enumerate(depth_colours(len(accuracy[0]))):
            line = [values[k] for values in accuracy]
            right.plot(number, line, color=colour, marker="o", label=f"exit {k + 1}")
        # The first epochs lie far below; with them in sight the exits' differences are not.
        later = [value for values in accuracy[len(accuracy) // 2 :] for value in values]
        span = max(max(later) - min(later), 2.0)
        right.set_ylim(min(later) - 0.5 * span, max(later) + 0.15 * span)
        right.set_ylabel("held-out accuracy in %")
        right.legend(loc="lower right")
        for axes in (left, right):
            axes.set_xlabel("epoch")
            axes.xaxis.get_major_locator().set_params(integer=True)


def plain_numbers(axis: Any) -> None:
    """``0.5`` and not ``5 x 10^-1`` on a logarithmic axis."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    axis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_locator(NullLocator())

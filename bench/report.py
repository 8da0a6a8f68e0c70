# SPDX-License-Identifier: Apache-2.0
"""From a results file to a page: tables, and where msdkern loses.

`python -m bench.report RESULTS.json [--readme README.md]` writes the page and the picture beside
the results and, if asked, the table between the markers of a README.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .cases import READ_ONLY
from .losing import where_we_lose
from .reading import PHASES, View, by_family, times_faster, views

TITLES = {
    ("loss", "both"): "Loss and gradient, forward and backward",
    ("loss", "forward"): "Loss, forward alone (no grad)",
    ("loss", "backward"): "Loss, backward alone",
    ("softmax", "both"): "Softmax of all exits, forward and backward",
    ("softmax", "forward"): "Softmax of all exits, forward alone (no grad)",
    ("statistics", "forward"): "Exit statistics (confidence, prediction, margin, entropy, ...)",
    ("gate", "forward"): "Gate of one exit (prediction, confidence, the rows that stay)",
}
BEGIN, END = "<!-- bench:{} -->", "<!-- /bench -->"


def page(results: dict[str, Any]) -> str:
    """The whole report as Markdown."""
    parts = [f"# Benchmark: {where(results)}", _facts(results)]
    for (family, phase), title in TITLES.items():
        found = by_family(results, family, phase)
        if found:
            parts += [f"## {title}", _times(found)]
    parts += _device_only(results)
    parts += ["## Peak memory of one call", _memory(results)]
    parts += ["## First call", _first_calls(results)]
    parts += [
        "## Where we lose",
        where_we_lose(results),
        "## How this was measured",
        _method(results),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def where(results: dict[str, Any]) -> str:
    """The machine in words."""
    machine, threads = results["machine"], results["settings"]["threads"]
    if any(entry["case"]["device"] == "cuda" for entry in results["cases"]):
        return str(machine["gpu"]["name"])
    return f"{machine['cpu']}, {threads} thread{'s' * (threads != 1)}"


def _facts(results: dict[str, Any]) -> str:
    software, machine = results["software"], results["machine"]
    commit = software["commit"] or "not recorded"
    load = ", ".join(map(str, results["settings"]["load"]))
    facts = [
        f"msdkern {software['msdkern']}, commit {commit}, kernels for {software['isa'] or 'none'}",
        f"PyTorch {software['torch']} ({machine['simd']}), Python {software['python']}",
        f"{machine['cores']} cores, load before and after the run {load}",
        f"taken on {results['date']}",
    ]
    return "\n".join(f"- {fact}" for fact in facts)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table: the first column to the left, numbers to the right."""
    rule = [":--" if i == 0 else "--:" for i in range(len(header))]
    lines = [header, rule, *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def seconds(value: float) -> str:
    """A duration in the unit that reads best, three digits."""
    unit, scale = ("µs", 1e6) if value < 1e-3 else ("ms", 1e3) if value < 1 else ("s", 1.0)
    digits = value * scale
    return f"{digits:.{0 if digits >= 100 else 1 if digits >= 10 else 2}f} {unit}"


def _times(found: list[View]) -> str:
    header = ["case", "K, N, C", "weights", "T", "dtype", "naive", "shared", "best compiled"]
    header += ["msdkern", "over best compiled", "over naive", "% of copy"]
    return table(header, (_time_row(view) for view in found))


def _time_row(view: View) -> list[str]:
    case, ours, floor = view.case, view.ours, view.best("floor")
    cells = [f"`{case['name']}`", f"{case['exits']}, {case['rows']}, {case['classes']}"]
    cells += [case["pair"] if case["family"] == "loss" else "-"]
    cells += ["-" if case["family"] in READ_ONLY else f"{case['temperature']:g}", case["dtype"]]
    for kind in ("naive", "eager"):
        rival = view.best(kind)
        cells.append(seconds(rival.median) if rival else "-")
    compiled, naive = view.best("compiled"), view.best("naive")
    short = compiled.name.removeprefix("compiled ") if compiled else ""
    cells.append(f"{seconds(compiled.median)} ({short})" if compiled else "-")
    cells.append(f"**{seconds(ours.median)}**" if ours else "left out")
    cells += [times_faster(ours, compiled), times_faster(ours, naive)]
    cells.append(f"{100 * floor.median / ours.median:.0f}" if ours and floor else "-")
    return cells


def _device_only(results: dict[str, Any]) -> list[str]:
    """Replays from a CUDA graph, and the host's time, where there are any."""
    rows = []
    for entry in results["cases"]:
        for c in entry["contenders"]:
            took = c.get("seconds", {})
            if c["kind"] in ("floor", "msdkern", "compiled") and "host" in took:
                graph = seconds(took["graph"]["median"]) if "graph" in took else "-"
                host = seconds(took["host"]["median"])
                rows.append([f"`{entry['case']['name']}`", c["name"], graph, host])
    if not rows:
        return []
    note = "Forward and backward. *graph*: device time, replayed from a CUDA graph over rotating"
    note += " buffers, for logits of up to 64 MB. *host*: time until the call has returned."
    header = ["case", "contender", "graph", "host"]
    return ["## Without the host, and the host alone", f"{table(header, rows)}\n\n{note}"]


def short_table(results: dict[str, Any]) -> str:
    """One line per case: our time, percent of the floor, and over the best compiled."""
    rows = []
    for family, phase in TITLES:
        if phase == "both" or family == "statistics":
            for view in by_family(results, family, phase):
                cells = _time_row(view)
                rows.append([cells[0], cells[1], cells[8], cells[9], cells[11]])
    return table(["case", "K, N, C", "msdkern", "over compiled", "% of copy"], rows)


def _memory(results: dict[str, Any]) -> str:
    header = ["case", "logits", "naive", "shared", "least compiled", "msdkern"]
    rows = []
    for entry in results["cases"]:
        cells = [f"`{entry['case']['name']}`", _size(entry["bytes"])]
        for kind in ("naive", "eager", "compiled", "msdkern"):
            sizes = [
                c["peak_bytes"]
                for c in entry["contenders"]
                if c["kind"] == kind and "peak_bytes" in c
            ]
            cells.append(_size(min(sizes)) if sizes else "-")
        rows.append(cells)
    return table(header, rows) + "\n\nAbove what the logits themselves take; gradients included."


def _size(value: float) -> str:
    for unit in ("B", "KB", "MB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} GB"


def _first_calls(results: dict[str, Any]) -> str:
    rows = []
    for entry in results["cases"]:
        cold = [
            c
            for c in entry["contenders"]
            if c["kind"] == "compiled" and not c.get("compile_cached") and "left_out" not in c
        ]
        ours = [c["first_call_seconds"] for c in entry["contenders"] if c["kind"] == "msdkern"]
        if cold and ours:
            all_of_them = sum(c["first_call_seconds"] for c in cold)
            slowest = max(cold, key=lambda c: c["first_call_seconds"])
            name = slowest["name"].removeprefix("compiled ")
            longest = f"{slowest['first_call_seconds']:.1f} s ({name})"
            rows.append(
                [f"`{entry['case']['name']}`", longest, f"{all_of_them:.1f} s", seconds(min(ours))]
            )
    if not rows:
        return "The compiler answered from its caches; `--fresh-compile` measures its time."
    header = ["case", "longest compilation", "all formulations", "msdkern's first call"]
    note = "Only formulations that did not come from the compiler's caches; checking included."
    return f"{table(header, rows)}\n\n{note}"


def _method(results: dict[str, Any]) -> str:
    kept = results["settings"]["memory_kept"]
    lines = [
        "Every contender's values and gradients were held against a float64 truth first; one that"
        " disagrees is left out.",
        "Blocks of five calls, the first dropped, contenders in turns, through autograd; medians."
        f"{_caches(results)} About {results['settings']['seconds']:g} s of timing per case.",
        "*naive*: one `F.kl_div` with its own two softmaxes per pair. *shared*: log-probabilities"
        " once per exit. *best compiled*: the fastest of the `torch.compile` formulations named in"
        " `bench/cases.py`, static shapes, chosen per case and phase.",
        "*copy*: reads the logits and writes results of their size through the same autograd"
        " machinery; the percentage is the share of msdkern's time that this alone takes.",
    ]
    if kept:
        lines.append("malloc keeps freed memory during the run, for every contender alike.")
    return "\n".join(f"- {line}" for line in lines)


def _caches(results: dict[str, Any]) -> str:
    if any(entry["case"]["device"] == "cuda" for entry in results["cases"]):
        return " Device events; caches cold, buffers rotating."
    return ""


class Change(NamedTuple):
    """One contender's time in two results."""

    case: str
    phase: str
    contender: str
    before: float
    after: float

    @property
    def ratio(self) -> float:
        """Above 1: slower than before."""
        return self.after / self.before


def changes(earlier: dict[str, Any], later: dict[str, Any]) -> Iterator[Change]:
    """msdkern's and the floor's times in both results, case by case."""
    for phase in PHASES:
        old = {view.case["name"]: view for view in views(earlier, phase)}
        for view in views(later, phase):
            before = old.get(view.case["name"])
            for time in view.times:
                match = before and before.named(time.name)
                if match and time.kind in ("msdkern", "floor"):
                    yield Change(view.case["name"], phase, time.name, match.median, time.median)


def comparison(earlier: dict[str, Any], later: dict[str, Any]) -> str:
    """A table of both results. The copy rows say how far the machine itself differs."""
    rows = [
        [f"`{c.case}`", c.phase, c.contender, seconds(c.before), seconds(c.after), f"{c.ratio:.2f}"]
        for c in changes(earlier, later)
    ]
    if not rows:
        return "The two results have no case in common."
    title = f"Earlier: {where(earlier)}, commit {earlier['software']['commit']}."
    title += f" Later: {where(later)}, commit {later['software']['commit']}."
    header = ["case", "phase", "contender", "earlier", "later", "later / earlier"]
    return f"{title}\n\n{table(header, rows)}"


def readme_table(results: dict[str, Any]) -> str:
    """What README shows of a results file, markers not included."""
    header = ["K, N, C", "what", "naive", "best compiled", "msdkern", "over compiled", "over naive"]
    rows = []
    for family, phase in (("loss", "both"), ("statistics", "forward"), ("gate", "forward")):
        for view in by_family(results, family, phase):
            cells = _time_row(view)
            case = view.case
            what = f"{case['pair']}, T = {case['temperature']:g}" if family == "loss" else family
            what += "" if case["dtype"] == "float32" else f", {case['dtype']}"
            rows.append([cells[1], what, cells[5], cells[7], cells[8], cells[9], cells[10]])
    software = results["software"]
    caption = (
        f"{where(results)}; PyTorch {software['torch']}, msdkern {software['msdkern']},"
        f" commit {software['commit'] or 'not recorded'}, {results['date']}. Losses: forward and"
        " backward; statistics and gates: forward. Medians."
    )
    return f"{table(header, rows)}\n\n{caption}\n\n**Where we lose**\n\n{where_we_lose(results)}"


def in_readme(text: str, name: str, results: dict[str, Any]) -> str:
    """README's text with the table between its markers replaced.

    Raises: ValueError when the markers are missing.
    """
    begin = BEGIN.format(name)
    head, found, rest = text.partition(begin)
    _, closed, tail = rest.partition(END)
    if not found or not closed:
        raise ValueError(f"bench: README must contain {begin} and {END}; got neither or one")
    return f"{head}{begin}\n\n{readme_table(results)}\n\n{END}{tail}"


def write(results: dict[str, Any], folder: Path, name: str) -> list[Path]:
    """Writes NAME.json, NAME.md and NAME.png and returns their paths."""
    from .picture import draw

    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{suffix}" for suffix in ("json", "md", "png")]
    paths[0].write_text(json.dumps(results, indent=1) + "\n")
    paths[1].write_text(page(results))
    draw(results, paths[2])
    return paths


def main(arguments: Sequence[str] | None = None) -> int:
    """Renders a results file again, without measuring."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=main.__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--readme", type=Path, help="also replace the table between its markers")
    args = parser.parse_args(arguments)
    results = json.loads(args.results.read_text())
    write(results, args.results.parent, args.results.stem)
    if args.readme is not None:
        text = args.readme.read_text()
        args.readme.write_text(in_readme(text, args.results.stem, results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

# SPDX-License-Identifier: Apache-2.0
"""What measurements say about the table of msdkern/executors/order.py.

    python -m bench.choose bench/results/h200.json   # its rows as measured, and where they disagree
    python -m bench.choose --measure FILE            # times the executors at the shape of every row

`bash bench/gpu.sh` does both. A row is measured at its own shape, and by every loss case that falls
into it and was timed with both executors.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

import msdkern
from msdkern import executors
from msdkern.executors import order

from .cases import Case
from .contenders import Contender
from .problem import Problem
from .reading import views
from .timing import measure

EXECUTORS = ("cuda", "triton")
NOISE = 0.97  # the first executor keeps its place unless the other takes less than this of its time
SECONDS = 1.5  # of timing per row


class Seen(NamedTuple):
    """Both executors' seconds for one shape, forward and backward."""

    name: str
    shape: order.Shape
    cuda: float
    triton: float

    @property
    def ratio(self) -> float:
        return self.triton / self.cuda


class Verdict(NamedTuple):
    """A row of the table, what was seen in it, and who should be first by that."""

    row: order.Region
    seen: list[Seen]
    first: str

    @property
    def measured(self) -> order.Region:
        """The row with the times at its own shape, where these were measured."""
        own = next((s for s in self.seen if s.name == _name(self.row)), None)
        times = {} if own is None else {"cuda": 1e6 * own.cuda, "triton": 1e6 * own.triton}
        return self.row._replace(first=self.first, **times)


# Reading ----------------------------------------------------------------------------------------


def seen_in(results: dict[str, Any]) -> list[Seen]:
    """Every shape at which both executors were timed."""
    return [*_rows_seen(results), *_cases_seen(results)]


def _rows_seen(results: dict[str, Any]) -> list[Seen]:
    found = []
    for entry in results.get("order", []):
        if set(EXECUTORS) <= set(entry["seconds"]):
            k, _, c, _ = entry["at"]
            shape, times = order.Shape(entry["kind"], k, c), entry["seconds"]
            found.append(Seen(entry["name"], shape, times["cuda"], times["triton"]))
    return found


def _cases_seen(results: dict[str, Any]) -> list[Seen]:
    found = []
    for view in views(results, "both"):
        times = [view.named(f"msdkern {name}") for name in EXECUTORS]
        case = view.case
        if case["family"] != "loss" or None in times:
            continue
        kind = "named" if case["pair"] in ("none", "mutual", "last") else "matrix"
        shape = order.Shape(kind, case["exits"] + case["teachers"], case["classes"])
        found.append(Seen(case["name"], shape, *(t.median for t in times if t is not None)))
    return found


def verdicts(results: dict[str, Any], device: str = "cuda") -> list[Verdict]:
    """One per row of the table. A row in which nothing was seen stays as it is."""
    seen = seen_in(results)
    found = []
    for row in order.REGIONS[device]:
        mine = [s for s in seen if order.region_of(device, s.shape) is row]
        first = row.first
        own = [s for s in mine if s.name == _name(row)]  # decides where it was timed
        if mine:
            ratio = math.exp(statistics.fmean(math.log(s.ratio) for s in own or mine))
            first = "triton" if ratio <= NOISE else "cuda"
        found.append(Verdict(row, mine, first))
    return found


def text(results: dict[str, Any]) -> str:
    """The rows as Python, and a line for each that the measurements contradict or leave out."""
    found = verdicts(results)
    lines = ["Rows of msdkern/executors/order.py by these results:", ""]
    lines += [f"    {order.source(v.measured)}" for v in found]
    lines += ["", f'with BASIS = "measured on ...", SHARE, SAVED = {NOISE}, 0.0', ""]
    for v in found:
        ratios = ", ".join(f"{s.name} {s.ratio:.2f}" for s in v.seen)
        if not v.seen:
            lines.append(f"{v.row.extent}: not measured with both executors; {v.row.first} stays")
        elif v.first != v.row.first:
            lines.append(
                f"{v.row.extent}: the table has {v.row.first}, measured is {v.first}"
                f" (triton / cuda: {ratios})"
            )
    return "\n".join([*lines, _summary(found)])


def _summary(found: Sequence[Verdict]) -> str:
    seen = [v for v in found if v.seen]
    wrong = sum(v.first != v.row.first for v in seen)
    return f"{len(seen)} of {len(found)} rows were measured; {wrong} of these disagree."


# Measuring --------------------------------------------------------------------------------------


def _name(row: order.Region) -> str:
    k, n, c, dtype = row.at
    return f"{row.kind} ({k}, {n}, {c}) {dtype}"


def _contender(problem: Problem, executor: str, kind: str) -> Contender:
    weights: Any = "mutual"
    if kind == "matrix":
        weights = torch.tensor(problem.recipe.weights).to(problem.case.device)

    def call() -> torch.Tensor:
        return msdkern.multi_exit_loss(
            problem.logits,
            problem.target,
            pair_weight=weights,
            temperature=problem.case.temperature,
            divergence="jsd" if kind == "jsd" else "forward_kl",
        ).loss

    session = functools.partial(msdkern.executor, executor)
    return Contender(f"msdkern {executor}", "msdkern", call, call, session)


def measure_row(
    row: order.Region, names: Sequence[str] = EXECUTORS, device: str = "cuda",
    seconds: float = SECONDS,
) -> dict[str, Any]:  # fmt: skip
    """Seconds of each executor at the shape of a row, by name."""
    k, n, c, dtype = row.at
    pair = "dense" if row.kind == "matrix" else "mutual"
    problem = Problem(Case(_name(row), k, n, c, pair, dtype=dtype, device=device))
    if device == "cuda":
        from .device import prepare

        prepare(problem)
    made = {name: _contender(problem, name, row.kind) for name in names}
    times = measure(made.values(), problem, seconds)
    took = {name: statistics.median(times[c.name]["both"]) for name, c in made.items()}
    return {"name": _name(row), "kind": row.kind, "at": list(row.at), "seconds": took}


def measure_table(path: Path) -> None:
    """All rows, with the executors that are there, into a file."""
    names = [n for n in EXECUTORS if executors.reason(n) is None]
    if not names:
        raise SystemExit("choose: an executor for GPUs must be available; got none")
    path.write_text(json.dumps([measure_row(row, names) for row in order.REGIONS["cuda"]]) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """1 where the table and the results disagree."""
    parser = argparse.ArgumentParser(prog="python -m bench.choose", description=__doc__)
    parser.add_argument("results", type=Path, help="results to read, or the file to write")
    parser.add_argument("--measure", action="store_true", help="measure on this machine's GPU")
    args = parser.parse_args(arguments)
    if args.measure:
        measure_table(args.results)
        return 0
    results = json.loads(args.results.read_text())
    print(text(results))
    return int(any(v.first != v.row.first for v in verdicts(results)))


if __name__ == "__main__":
    raise SystemExit(main())

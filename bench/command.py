# SPDX-License-Identifier: Apache-2.0
"""`msdkern bench`: runs the cases and writes JSON, a Markdown page and a picture."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `msdkern bench`."""
    add = parser.add_argument
    add(
        "--cases",
        nargs="+",
        metavar="NAME",
        help="by name or pattern, like imagenet* (default: all)",
    )
    add("--list", action="store_true", help="print the cases and stop")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="which cases (default: cpu)")
    add("--quick", action="store_true", help="few cases, little time each: a first impression")
    add("--seconds", type=float, metavar="S", help="seconds of timing per case (default: 4)")
    add(
        "--executor", nargs="+", metavar="NAME", help="executors to time (default: all native ones)"
    )
    add("--threads", type=int, metavar="N", help="threads of every contender")
    add("--every-formulation", action="store_true", help="compile all formulations in all cases")
    add("--fresh-compile", action="store_true", help="ignore compile caches: true compile times")
    add("--out", type=Path, metavar="DIR", help="write bench.json, bench.md and bench.png here")
    add("--name", default="bench", metavar="NAME", help="name of the files in DIR")
    add("--compare", type=Path, metavar="JSON", help="set the times against earlier results")
    add("--json", action="store_true", help="print the results as one JSON object on the last line")


def run(args: argparse.Namespace) -> int:
    """Runs `msdkern bench`; 0 when every contender of ours gave correct results, else 1."""
    if args.threads is not None:
        # Also for OpenMP runtimes that are loaded later than PyTorch's own.
        os.environ["OMP_NUM_THREADS"] = str(args.threads)
    from .cases import select

    try:
        earlier = json.loads(args.compare.read_text()) if args.compare else None
        cases = select(args.cases, args.device, args.quick)
        _check(args)
    except (OSError, ValueError) as error:
        print(f"msdkern bench: {str(error).removeprefix('bench: ')}", file=sys.stderr)
        return 1
    if args.list:
        print("\n".join(f"{case.name:<26}{case.shape:<20}{case.group}" for case in cases))
        return 0
    results = _measure(args, cases)
    _write(args, results, earlier)
    return 1 if _wrong(results) else 0


def _check(args: argparse.Namespace) -> None:
    import torch

    if args.device == "cuda" and not torch.cuda.is_available() and not args.list:
        raise ValueError("bench: device cuda must be available; got none")
    if args.threads is not None and args.threads < 1:
        raise ValueError(f"bench: threads must be at least 1; got {args.threads}")
    if args.seconds is not None and args.seconds <= 0:
        raise ValueError(f"bench: seconds must be positive; got {args.seconds}")
    if args.executor:
        from msdkern import executors

        known = sorted({name for cells in executors.table().values() for name in cells})
        for name in args.executor:
            if name not in known:
                raise ValueError(f"bench: executor must be one of {', '.join(known)}; got {name!r}")


def _measure(args: argparse.Namespace, cases: list[Any]) -> dict[str, Any]:
    import torch

    from .runner import Settings, run

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    settings = Settings(
        seconds=args.seconds or (1.0 if args.quick else 4.0),
        executors=tuple(args.executor) if args.executor else None,
        every_formulation=args.every_formulation,
        fresh_compile=args.fresh_compile,
    )
    progress = Progress()
    results = run(cases, settings, progress)
    progress.end()
    return results


class Progress:
    """One line that is rewritten on a terminal, one line per case elsewhere."""

    def __init__(self) -> None:
        self.live = sys.stderr.isatty()
        self.case = ""

    def __call__(self, line: str) -> None:
        case = line.partition(":")[0]
        if self.live:
            print(f"\r\x1b[2K{line}", end="", file=sys.stderr, flush=True)
        elif case != self.case:
            print(case, file=sys.stderr, flush=True)
        self.case = case

    def end(self) -> None:
        """Leaves the line."""
        if self.live:
            print("\r\x1b[2K", end="", file=sys.stderr, flush=True)


def _write(
    args: argparse.Namespace, results: dict[str, Any], earlier: dict[str, Any] | None
) -> None:
    from .report import comparison, page, write

    if args.out is not None:
        for path in write(results, args.out, args.name):
            print(f"wrote {path}", file=sys.stderr)
    print(page(results))
    if earlier is not None:
        print(f"## Compared with {args.compare}\n\n{comparison(earlier, results)}\n")
    if args.json:
        print(json.dumps(results))


def _wrong(results: dict[str, Any]) -> bool:
    return any(
        contender["kind"] == "msdkern" and "left_out" in contender
        for entry in results["cases"]
        for contender in entry["contenders"]
    )

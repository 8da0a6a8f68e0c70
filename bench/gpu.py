# SPDX-License-Identifier: Apache-2.0
"""The stages of `bench/gpu.sh`: each a command of at most 8 minutes that leaves a file when done.

A run continues where the last one stopped. A stage that fails does not stop the others; it is
tried again by the next run. What a machine lacks (pytest, compute-sanitizer) is left out by name.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
STATE = ROOT / "bench" / "results" / ".gpu"
ORDER = "order.json"
LIMIT = 470  # seconds of a stage
ON_GPU = {"MSDKERN_TEST_DEVICE": "cuda"}


@dataclass(frozen=True)
class Stage:
    """A command, what it needs besides Python, and settings of its environment."""

    name: str
    command: tuple[str, ...]
    needs: tuple[str, ...] = ()  # Python modules, or programs on PATH
    environment: tuple[tuple[str, str], ...] = ()


def python(*words: str) -> tuple[str, ...]:
    return (sys.executable, *words)


def stages() -> list[Stage]:
    """All stages in order."""
    return [*_build(), *_tests(), *_sanitizer(), *_cases(), _order(), _report()]


def _build() -> Iterator[Stage]:
    pip = ("-m", "pip", "install", "-q", "--no-index", "--no-build-isolation", "--no-deps", "-e")
    yield Stage("build", python(*pip, "."), ("nvcc",), (("MSDKERN_CUDA", "on"),))
    yield Stage("doctor", python("-m", "msdkern", "doctor"))


def _tests() -> Iterator[Stage]:
    """The tests of the ops and executors on the GPU file by file, then all others as they are."""
    needs = ("pytest", "hypothesis")
    pytest = ("-m", "pytest", "-q", "-p", "no:cacheprovider")
    for folder in ("ops", "executors"):
        for file in sorted((ROOT / "tests" / folder).glob("test_*.py")):
            path = str(file.relative_to(ROOT))
            name = f"test {folder}/{file.stem.removeprefix('test_')}"
            yield Stage(name, python(*pytest, path), needs, tuple(ON_GPU.items()))
    others = {"ops", "executors"}
    for folder in sorted((ROOT / "tests").iterdir()):
        if folder.is_dir() and folder.name not in others and list(folder.glob("test_*.py")):
            path = str(folder.relative_to(ROOT))
            yield Stage(f"test {folder.name}", python(*pytest, path), needs)
    for file in sorted((ROOT / "tests").glob("test_*.py")):
        yield Stage(f"test {file.stem}", python(*pytest, str(file.relative_to(ROOT))), needs)


def _sanitizer() -> Iterator[Stage]:
    for tool in ("memcheck", "racecheck", "synccheck"):
        sanitizer = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "1")
        command = (*sanitizer, *python("-m", "bench.gpu", "--small"))
        environment = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)
        yield Stage(f"sanitizer {tool}", command, ("compute-sanitizer",), environment)


def _cases() -> Iterator[Stage]:
    from .cases import CASES

    for case in CASES.values():
        if case.device == "cuda":
            yield Stage(f"bench {case.name}", python("-m", "bench.gpu", "--case", case.name))


def _order() -> Stage:
    """Both executors at the shapes of the table that chooses between them."""
    file = str(STATE / ORDER)
    return Stage("order", python("-m", "bench.choose", "--measure", file), ("triton",))


def _report() -> Stage:
    return Stage("report", python("-m", "bench.gpu", "--report"))


# Running ----------------------------------------------------------------------------------------


def done_file(stage: Stage, state: Path) -> Path:
    return state / (re.sub(r"[^\w.]+", "-", stage.name) + ".done")


def missing(stage: Stage) -> str | None:
    """What the stage needs and this machine lacks."""
    for name in stage.needs:
        if shutil.which(name) is None and importlib.util.find_spec(name) is None:
            return name
    return None


def run_stage(stage: Stage, state: Path, limit: float = LIMIT) -> str:
    """done, failed, out of time, or left out; its output is kept beside the file."""
    lack = missing(stage)
    if lack is not None:
        return f"left out: {lack} is not there"
    environment = {**os.environ, **dict(stage.environment)}
    log = done_file(stage, state).with_suffix(".log")
    began = time.monotonic()
    with log.open("w") as output:
        try:
            done = subprocess.run(
                stage.command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT,
                timeout=limit, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return f"out of time after {limit:g} s"
    if done.returncode != 0:
        return f"failed with {done.returncode}: {log.name}"
    done_file(stage, state).write_text(f"{time.monotonic() - began:.1f} s\n")
    return "done"


def run_all(
    found: Sequence[Stage],
    state: Path,
    minutes: float | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, str]:
    """Every stage that is not done. The report is made again whenever something else was."""
    state.mkdir(parents=True, exist_ok=True)
    end = None if minutes is None else time.monotonic() + 60 * minutes
    outcomes: dict[str, str] = {}
    for stage in found:
        fresh = any(outcome == "done" for outcome in outcomes.values())
        if done_file(stage, state).exists() and not (stage.name == "report" and fresh):
            continue
        if end is not None and time.monotonic() > end:
            outcomes[stage.name] = "not started: run again to go on"
        else:
            outcomes[stage.name] = run_stage(stage, state)
        say(f"{stage.name:<32}{outcomes[stage.name]}")
    return outcomes


# Parts ------------------------------------------------------------------------------------------


def measure_case(name: str, state: Path) -> int:
    """Measures one case and keeps its results as a file."""
    from .cases import CASES
    from .runner import Settings, run

    results = run([CASES[name]], Settings(seconds=4.0), lambda line: print(line, flush=True))
    (state / f"{name}.json").write_text(json.dumps(results) + "\n")
    ours = [c for c in results["cases"][0]["contenders"] if c["kind"] == "msdkern"]
    return 1 if any("left_out" in c for c in ours) else 0


def small_set() -> int:
    """A few calls of every executor, for compute-sanitizer: each form, home and divergence."""
    import torch

    import msdkern
    from msdkern import executors

    generator = torch.Generator("cuda").manual_seed(0)
    for name in executors.PREFERENCE["cuda"]:
        if executors.reason(name) is not None or name == "eager":
            continue
        for classes, options in ((10, {}), (1000, {"divergence": "jsd"}), (9001, {})):
            z = [
                torch.randn(5, classes, generator=generator, device="cuda").requires_grad_()
                for _ in range(3)
            ]
            y = torch.tensor([0, 1, -100, 3, 9], device="cuda")
            with msdkern.executor(name):
                loss = msdkern.multi_exit_loss(z, y, pair_weight="mutual", **options).loss
                (loss * 2.0).backward()
                rows = msdkern.multi_exit_row_losses(z, y, pair_weight="last")
                (rows.cross_entropy + rows.divergence).sum().backward()
                msdkern.multi_exit_softmax(z, 2.0)[0].sum().backward()
                msdkern.exit_statistics(z)
                if executors.table()["gate_step"][name] is None:
                    small_gates(z)
    torch.cuda.synchronize()
    return 0


def small_gates(z: list[Any]) -> None:
    """Gates over the same logits, and the rows that stay, there and back."""
    import msdkern

    for measure in ("confidence", "margin", "entropy", "patience"):
        msdkern.exit_gate(z, 0.5, measure)
    step = msdkern.gate_step(z[0].detach(), 0.5)
    x = (z[1].detach(), step.prediction, step.score.half())
    msdkern.scatter_rows(x, msdkern.compact_rows(x, step.stay, step.count), step.stay, step.count)


def merged(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One results file of the cases' own."""
    whole = {**parts[0], "cases": [entry for part in parts for entry in part["cases"]]}
    loads = [load for part in parts for load in part["settings"]["load"]]
    whole["settings"] = {**parts[0]["settings"], "load": [loads[0], loads[-1]]}
    return whole


def file_name(gpu: str) -> str:
    """NVIDIA H200 -> h200."""
    words = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-").split("-")
    return "-".join(word for word in words if word not in ("nvidia", "geforce", "amd")) or "gpu"


def report(state: Path, folder: Path, order: Sequence[str]) -> int:
    """Writes <gpu>.json and <gpu>.md from what has been measured, and prints a short table."""
    from . import choose
    from .report import page, short_table

    files = [state / f"{name}.json" for name in order]
    parts = [json.loads(file.read_text()) for file in files if file.exists()]
    if not parts:
        print("gpu: at least one case must have been measured; got none")
        return 1
    results = merged(parts)
    if (state / ORDER).exists():
        results["order"] = json.loads((state / ORDER).read_text())
    name = file_name(results["machine"]["gpu"]["name"])
    (folder / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / f"{name}.md").write_text(page(results))
    print(short_table(results), choose.text(results), sep="\n\n")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench/gpu.sh", description=__doc__)
    add = parser.add_argument
    add("--list", action="store_true", help="print the stages and stop")
    add("--minutes", type=float, metavar="M", help="start no stage after so many minutes")
    add("--again", action="store_true", help="forget what is done")
    for part in ("--small", "--report"):
        add(part, action="store_true", help=argparse.SUPPRESS)
    add("--case", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.case:
        return measure_case(args.case, STATE)
    if args.small:
        return small_set()
    found = stages()
    if args.report:
        names = [s.name.removeprefix("bench ") for s in found if s.name.startswith("bench ")]
        return report(STATE, STATE.parent, names)
    if args.again:
        shutil.rmtree(STATE, ignore_errors=True)
    if args.list:
        for stage in found:
            print(f"{stage.name:<32}{'done' if done_file(stage, STATE).exists() else 'to do'}")
        return 0
    outcomes = run_all(found, STATE, args.minutes)
    log = done_file(_report(), STATE).with_suffix(".log")
    if log.exists():
        print(log.read_text())
    return 1 if any(o.startswith(("failed", "out of time")) for o in outcomes.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())

# SPDX-License-Identifier: Apache-2.0
"""Runs cases one after the other and returns plain data, ready to be written as JSON."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from . import device
from .cases import Case
from .contenders import Contender, contenders, prepare
from .machine import keep_memory, machine, software
from .memory import peak_bytes
from .problem import Problem
from .timing import measure, summary

FORMAT = 1
Say = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """How a run is made; written into its results."""

    seconds: float = 4.0  # of timing per case, compiling not counted
    executors: tuple[str, ...] | None = None  # None: the fastest kind that serves the device
    every_formulation: bool = False
    fresh_compile: bool = False  # ignore the compiler's caches, so that its time is true


def run(cases: list[Case], settings: Settings, say: Say = lambda line: None) -> dict[str, Any]:
    """Measures every case; `say` is told what is going on."""
    kept = keep_memory()
    results: dict[str, Any] = {
        "format": FORMAT,
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "software": software(),
        "settings": {
            "threads": torch.get_num_threads(),
            "seconds": settings.seconds,
            "compile_caches": not settings.fresh_compile,
            "memory_kept": kept,
            "load": [_load()],
        },
        "cases": [],
    }
    for number, case in enumerate(cases, 1):
        prefix = f"[{number}/{len(cases)}] {case.name} {case.shape}"

        def tell(line: str, prefix: str = prefix) -> None:
            say(f"{prefix}: {line}")

        results["cases"].append(run_case(case, settings, tell))
    results["settings"]["load"].append(_load())
    return results


def run_case(case: Case, settings: Settings, say: Say = lambda line: None) -> dict[str, Any]:
    """Measures one case: every contender is checked first, then all are timed in turns."""
    # Formulations are shared between cases; without this the compiler would meet its limit of
    # versions of one function and give up.
    torch._dynamo.reset()
    problem = Problem(case)
    say("truth in float64")
    problem.truth  # noqa: B018  computed once, before anybody's clock starts
    made = contenders(problem, list(executors_for(case, settings)), settings.every_formulation)
    with torch._inductor.config.patch(force_disable_caches=settings.fresh_compile):
        for contender in made:
            say(f"checking {contender.name}")
            prepare(contender, problem)
    say("timing")
    if case.device == "cuda":
        device.prepare(problem)
    times = measure(made, problem, settings.seconds)
    if case.device == "cuda":
        device.measure_more(made, problem, times)
    return {
        "case": case.to_json(),
        "group": case.group,
        "bytes": problem.bytes,
        "contenders": [_entry(c, times.get(c.name, {}), problem) for c in made],
    }


def executors_for(case: Case, settings: Settings) -> tuple[str, ...]:
    """The executors asked for, else every native one that serves the case, else eager."""
    if settings.executors is not None:
        return settings.executors
    from msdkern import executors

    served = executors.table()[OPS[case.family]]
    native = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}[case.device]
    return tuple(name for name in native if served.get(name, "") is None) or ("eager",)


OPS = {
    "loss": "multi_exit_loss",
    "softmax": "multi_exit_softmax",
    "statistics": "exit_statistics",
    "gate": "gate_step",
}


def _entry(
    contender: Contender, samples: dict[str, list[float]], problem: Problem
) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": contender.name, "kind": contender.kind, **contender.facts}
    if contender.left_out is not None:
        return {**entry, "left_out": contender.left_out}
    entry["seconds"] = {phase: summary(values) for phase, values in samples.items()}
    entry["peak_bytes"] = peak_bytes(contender, problem)
    return entry


def _load() -> float | None:
    """Processes that wanted to run during the last minute: says whether the machine was quiet."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None

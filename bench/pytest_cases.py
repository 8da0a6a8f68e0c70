# SPDX-License-Identifier: Apache-2.0
"""What `bench_*.py` share: contenders as parameters, each checked before it is timed."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from .cases import CASES, Case
from .contenders import Contender, contenders, prepare
from .problem import Problem
from .runner import Settings, executors_for


def parameters(family: str) -> list[Any]:
    """(case, contender's name) for every case of a family that this machine can run."""
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    found = []
    for case in CASES.values():
        if case.family == family and case.device in devices:
            names = ["copy", *(f"msdkern {e}" for e in executors_for(case, Settings()))]
            names += ["naive", "shared", *(f"compiled {name}" for name in case.formulations)]
            found += [pytest.param(case, name, id=f"{case.name}-{name}") for name in names]
    return found


@functools.lru_cache(maxsize=1)
def _problem(case: Case) -> tuple[Problem, dict[str, Contender]]:
    torch._dynamo.reset()
    problem = Problem(case)
    found = contenders(problem, list(executors_for(case, Settings())))
    return problem, {contender.name: contender for contender in found}


def time_it(benchmark: Any, case: Case, name: str, train: bool) -> None:
    """Asserts agreement with the truth, then times one contender."""
    problem, found = _problem(case)
    contender = found[name]
    prepare(contender, problem)
    assert contender.left_out is None, contender.left_out
    benchmark.group = case.group + ("" if train else "/forward")
    benchmark.extra_info.update(contender.facts, case=case.to_json(), contender=name)
    with contender.session(), torch.set_grad_enabled(train):
        benchmark(_step if train else _forward, contender, problem)


def _step(contender: Contender, problem: Problem) -> None:
    problem.gradients(contender.train())
    _settle(problem)


def _forward(contender: Contender, problem: Problem) -> None:
    contender.infer()
    _settle(problem)


def _settle(problem: Problem) -> None:
    """A GPU call returns before its kernels end; `msdkern bench` times by events instead."""
    if problem.case.device == "cuda":
        torch.cuda.synchronize()

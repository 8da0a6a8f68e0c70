# SPDX-License-Identifier: Apache-2.0
"""Who takes part in a case: PyTorch as written, compiled PyTorch, peers, msdkern and the floor."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch

from . import floor, peers
from .baselines import BASELINES
from .problem import Problem, WrongResult

Call = Callable[..., Any]


@dataclass
class Contender:
    """One way to compute a case. `left_out` says why it was not timed."""

    name: str
    kind: str  # naive | eager | compiled | peer | msdkern | floor
    train: Call  # forward that a backward follows
    infer: Call  # forward alone, run without grad
    session: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    left_out: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)  # errors, first-call and compile seconds


def contenders(
    problem: Problem, executors: list[str], every_formulation: bool = False
) -> list[Contender]:
    """All contenders of a case, the quickest to start first."""
    made = [
        Contender("copy", "floor", lambda: floor.train(problem), lambda: floor.infer(problem)),
        *(_ours(problem, name) for name in executors),
        *_pytorch(problem, every_formulation),
    ]
    if problem.case.device == "cuda":
        made += [_plain(name, "peer", call) for name, call in peers.available(problem)]
    return made


def _plain(name: str, kind: str, call: Call) -> Contender:
    return Contender(name, kind, call, call)


def _pytorch(problem: Problem, every_formulation: bool) -> Iterator[Contender]:
    def data() -> tuple[Any, ...]:
        return problem.recipe, problem.logits, problem.target, problem.teachers

    baselines = BASELINES[problem.case.family]
    yield _plain("naive", "naive", lambda: baselines.naive(*data()))
    yield _plain("shared", "eager", lambda: baselines.shared(*data()))
    for name, formulation in baselines.compiled.items():
        if every_formulation or name in problem.case.formulations:
            # The function itself, not a partial of it: all partials share one frame, whose limit
            # of compiled versions five formulations exceed. It reads the recipe as constants.
            compiled = torch.compile(formulation, dynamic=False, fullgraph=True)
            call = functools.partial(_call_with, compiled, data)
            yield Contender(f"compiled {name}", "compiled", call, call, _as_many_as_it_takes)


def _as_many_as_it_takes() -> AbstractContextManager[Any]:
    """Lets the compiler keep `nonzero`, whose length it cannot know, in the graph."""
    return torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)


def _call_with(function: Call, data: Callable[[], tuple[Any, ...]]) -> Any:
    return function(*data())


def _ours(problem: Problem, executor: str) -> Contender:
    import msdkern

    call = OURS[problem.case.family](problem)
    session = functools.partial(msdkern.executor, executor)
    return Contender(f"msdkern {executor}", "msdkern", call, call, session)


def _loss_call(problem: Problem) -> Call:
    import msdkern

    case = problem.case
    named = {"mutual": "mutual", "last": "last", "none": None}
    weights = named[case.pair] if case.pair in named else torch.tensor(problem.recipe.weights)
    if isinstance(weights, torch.Tensor):
        weights = weights.to(case.device)
    teachers = problem.teachers or None

    def call() -> torch.Tensor:
        return msdkern.multi_exit_loss(
            problem.logits,
            problem.target,
            pair_weight=weights,
            teacher_logits=teachers,
            temperature=case.temperature,
        ).loss

    return call


def _softmax_call(problem: Problem) -> Call:
    import msdkern

    t = problem.case.temperature
    return lambda: msdkern.multi_exit_softmax(problem.logits, temperature=t)


def _statistics_call(problem: Problem) -> Call:
    import msdkern

    return lambda: msdkern.exit_statistics(problem.logits)


def _gate_call(problem: Problem) -> Call:
    """What the naive form returns, to the host's knowledge of how many rows stay."""
    import msdkern

    (z,), threshold = problem.logits, problem.recipe.threshold

    def call() -> tuple[torch.Tensor, ...]:
        step = msdkern.gate_step(z, threshold)
        return step.prediction[None], step.score, step.stay[: int(step.count)]

    return call


OURS = {
    "loss": _loss_call,
    "softmax": _softmax_call,
    "statistics": _statistics_call,
    "gate": _gate_call,
}


def prepare(contender: Contender, problem: Problem) -> None:
    """Runs a contender once in each way and holds it against the truth.

    A contender that fails or disagrees keeps the reason in `left_out` and is not timed.
    """
    hits = _compile_hits()
    began = time.perf_counter()
    try:
        with contender.session():
            outputs = contender.train()
            if contender.kind != "floor":
                contender.facts["errors"] = problem.check(outputs)
            elif problem.truth.gradients is not None:
                problem.gradients(outputs)
            with torch.no_grad():
                contender.infer()
    except WrongResult as wrong:
        contender.left_out = str(wrong)
    except Exception as error:  # a contender that cannot run must not end the others' run
        contender.left_out = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    contender.facts["first_call_seconds"] = time.perf_counter() - began
    if contender.kind == "compiled":
        contender.facts["compile_cached"] = _compile_hits() > hits


def _compile_hits() -> int:
    from torch._dynamo.utils import counters

    return sum(counters["inductor"][name] for name in ("fxgraph_cache_hit",)) + sum(
        counters["aot_autograd"][name] for name in ("autograd_cache_hit",)
    )

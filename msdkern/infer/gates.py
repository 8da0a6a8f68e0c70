# SPDX-License-Identifier: Apache-2.0
"""What all runners share: the checks of a model and its thresholds, one stage, one gate."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from msdkern import reference
from msdkern.calibrate.files import Thresholds
from msdkern.ops import checks
from msdkern.ops.compact import compact_rows
from msdkern.ops.gate import GateStep, gate_step

Score = Callable[[int, Any, list[Tensor]], Tensor]


class Gates:
    """The thresholds of K exits, and what they ask of the logits."""

    def __init__(
        self,
        op: str,
        exits: int,
        thresholds: Thresholds | float | Sequence[float] | Tensor,
        measure: str,
        temperature: float | Sequence[float] | Tensor,
        score: Score | None,
    ) -> None:
        if isinstance(thresholds, Thresholds):
            measure, temperature = thresholds.measure, thresholds.temperature
            thresholds = thresholds.thresholds
        checks.choice(op, "measure", measure, reference.MEASURES)
        if (score is None) != (measure != "score"):
            checks.fail(op, "score must be given exactly when measure is 'score'", measure)
        self.measure, self.score = measure, score
        self.thresholds = numbers(op, "thresholds", thresholds, exits)
        self.temperature = numbers(op, "temperature", temperature, exits)
        if any(t != t for t in self.thresholds):
            checks.fail(op, "thresholds must not be NaN", self.thresholds[0])
        if not all(0 < t < float("inf") for t in self.temperature):
            checks.fail(op, "temperature must be positive and finite", self.temperature[0])

    def step(
        self, k: int, features: Any, logits: list[Tensor], previous: tuple[Tensor, ...] | None
    ) -> GateStep:
        """The gate of exit k for the rows in flight."""
        given = None if self.score is None else self.score(k, features, logits)
        return gate_step(
            logits[-1],
            self.thresholds[k],
            self.measure,
            temperature=self.temperature[k],
            score=given,
            previous=previous,
        )

    def memory(self, step: GateStep) -> tuple[Tensor, ...] | None:
        """What the next gate has to know of this one, row by row."""
        return (step.prediction, step.score) if self.measure == "patience" else None


def numbers(op: str, name: str, value: Any, exits: int) -> list[float]:
    """K floats from one number, a sequence or a tensor."""
    if isinstance(value, Tensor):
        value = value.detach().cpu().tolist()
    if isinstance(value, checks.NUMBERS):
        return [float(value)] * exits
    if not isinstance(value, (list, tuple)) or len(value) != exits:
        checks.fail(op, f"{name} must be one number or {exits}, one per exit", value)
    return [float(v) for v in value]


def stages_of(op: str, model: nn.Module) -> list[nn.Module]:
    """The stages of a model, each ``(features, logits) -> (features, logits + [new])``."""
    stages = getattr(model, "stages", None)
    if stages is None or not len(stages):
        checks.fail(op, "the model must have stages", type(model).__name__)
    return list(stages)


def rows_of(op: str, features: Any) -> int:
    """The length of the first axis of all tensors in x."""
    leaves, _ = flatten(features)
    if not leaves or any(t.dim() == 0 or t.shape[0] != leaves[0].shape[0] for t in leaves):
        shapes = [list(t.shape) for t in leaves]
        checks.fail(op, "x must be tensors that share their first axis, the rows", str(shapes))
    return leaves[0].shape[0]


def device_of(features: Any) -> torch.device:
    return flatten(features)[0][0].device


class State(NamedTuple):
    """What travels with the rows in flight; each part has one entry per row."""

    features: Any  # a tensor, or any nest of lists, tuples and dicts of tensors
    logits: list[Tensor]
    memory: tuple[Tensor, ...] | None = None  # of the gate
    origin: Tensor | None = None  # where the rows came from; None: they are all there

    def tensors(self) -> tuple[list[Tensor], Callable[[Iterable[Tensor]], State]]:
        """All of them, and how to make a state of others in their places."""
        leaves, rebuild = flatten(self.features)
        where = () if self.origin is None else (self.origin,)
        groups: tuple[Sequence[Tensor], ...] = (leaves, self.logits, self.memory or (), where)

        def again(tensors: Iterable[Tensor]) -> State:
            found = iter(tensors)
            features, logits, memory, where = (
                list(itertools.islice(found, len(group))) for group in groups
            )
            return State(rebuild(features), logits, tuple(memory) or None, *where)

        return [tensor for group in groups for tensor in group], again


def compact(state: State, stay: Tensor, count: int) -> State:
    """The rows that stay, in one copy, and where they came from."""
    tensors, again = state.tensors()
    kept = again(compact_rows(tensors, stay, count))
    return kept if kept.origin is not None else kept._replace(origin=stay[:count])


def cut(state: State, begin: int, end: int | None) -> State:
    """Rows begin .. end, as views."""
    tensors, again = state.tensors()
    return again(t[begin:end] for t in tensors)


def join(states: list[State]) -> State:
    """The rows of several states of one shape, one after the other."""
    if len(states) == 1:
        return states[0]
    again = states[0].tensors()[1]
    columns = zip(*(state.tensors()[0] for state in states), strict=True)
    return again(torch.cat(parts) for parts in columns)


def flatten(features: Any) -> tuple[list[Tensor], Callable[[list[Tensor]], Any]]:
    """All tensors of a nest, and how to put others in their places.

    What networks hand on as a rule is told apart here, at a tenth of what PyTorch's walk takes.
    """
    if isinstance(features, Tensor):
        return [features], itemgetter(0)
    if type(features) in (list, tuple) and all(isinstance(leaf, Tensor) for leaf in features):
        return list(features), type(features)
    leaves, spec = pytree.tree_flatten(features)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def rebuild(tensors: list[Tensor]) -> Any:
        for i, tensor in zip(places, tensors, strict=True):
            leaves[i] = tensor
        return pytree.tree_unflatten(leaves, spec)

    return [leaves[i] for i in places], rebuild


class Inference:
    """``with inference():`` evaluation mode and no gradients; then all modes are as they were.

    Looking at every module of a deep model takes longer than running a small one. So only the model
    and its stages are looked at, once all modules were found in evaluation mode; what is switched
    alone inside a stage after that stays as it is.
    """

    def __init__(self, model: nn.Module, stages: Sequence[nn.Module]) -> None:
        self.modules, self.outer = list(model.modules()), [model, *stages]
        self.mixed = True  # until all were seen in evaluation mode

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        training = []
        if self.mixed or any(module.training for module in self.outer):
            training = [module for module in self.modules if module.training]
            self.mixed = bool(training)
        for module in training:
            module.training = False
        try:
            with torch.no_grad():
                yield
        finally:
            for module in training:
                module.training = True


def run_stage(
    op: str, stage: nn.Module, k: int, features: Any, logits: list[Tensor], rows: int | None = None
) -> Any:
    """One stage, and the rules: it adds one exit's answers, for all rows where they are counted."""
    features, found = stage(features, logits)
    if not isinstance(found, (list, tuple)) or len(found) != len(logits) + 1:
        rule = f"stage {k + 1} must return (features, logits + [new]) with {len(logits) + 1} logits"
        checks.fail(
            op, rule, len(found) if isinstance(found, (list, tuple)) else type(found).__name__
        )
    if rows is not None and found[-1].shape[0] != rows:
        checks.fail(op, f"stage {k + 1} must answer the {rows} rows that it gets", found[-1])
    return features, list(found)

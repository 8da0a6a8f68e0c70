# SPDX-License-Identifier: Apache-2.0
"""What all runners share: the checks of a model and its thresholds, one stage, one gate."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

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

    def memory(self, step: GateStep) -> tuple[Tensor, ...]:
        """What the next gate has to know of this one, row by row."""
        return (step.prediction, step.score) if self.measure == "patience" else ()


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
    leaves = [t for t in pytree.tree_leaves(features) if isinstance(t, Tensor)]
    if not leaves or any(t.dim() == 0 or len(t) != len(leaves[0]) for t in leaves):
        shapes = [list(t.shape) for t in leaves]
        checks.fail(op, "x must be tensors that share their first axis, the rows", str(shapes))
    return len(leaves[0])


def device_of(features: Any) -> torch.device:
    return next(t.device for t in pytree.tree_leaves(features) if isinstance(t, Tensor))


def compact(state: Any, stay: Tensor, count: int) -> Any:
    """The rows that stay, of every tensor in any nest of lists, tuples and dicts; one launch."""
    leaves, spec = pytree.tree_flatten(state)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    for i, rows in zip(places, compact_rows([leaves[i] for i in places], stay, count), strict=True):
        leaves[i] = rows
    return pytree.tree_unflatten(leaves, spec)


@contextlib.contextmanager
def inference(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Evaluation mode and no gradients; afterwards every module is in the mode it was in.

    Takes the list of a model's modules, which is made once: walking a deep model takes longer than
    running a small one.
    """
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def cut(state: Any, begin: int, end: int | None) -> Any:
    """Rows begin .. end of every tensor in the nest, as views."""
    return pytree.tree_map(lambda t: t[begin:end] if isinstance(t, Tensor) else t, state)


def join(states: list[Any]) -> Any:
    """The rows of several nests of one shape, one after the other."""
    if len(states) == 1:
        return states[0]
    return pytree.tree_map(
        lambda *parts: torch.cat(parts) if isinstance(parts[0], Tensor) else parts[0], *states
    )


def run_stage(op: str, stage: nn.Module, k: int, features: Any, logits: list[Tensor]) -> Any:
    """One stage, and the rule that it adds one exit's answers."""
    features, found = stage(features, logits)
    if not isinstance(found, (list, tuple)) or len(found) != len(logits) + 1:
        rule = f"stage {k + 1} must return (features, logits + [new]) with {len(logits) + 1} logits"
        checks.fail(
            op, rule, len(found) if isinstance(found, (list, tuple)) else type(found).__name__
        )
    return features, list(found)

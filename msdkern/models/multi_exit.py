# SPDX-License-Identifier: Apache-2.0
"""A multi-exit network is a list of stages, each of which ends in one exit.

A stage maps ``(features, logits)`` to ``(features, logits + [new])``: features travel forward,
answers are carried along. So a network can be cut between any two stages (adaptive inference
stops there, a pipeline of machines is cut there), and `features` may be whatever the next stage
understands: a tensor, or a tuple of tensors for multi-scale networks.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn


class Exit(nn.Module):
    """Answers from intermediate features: branch, tail (pooling), then classifier.

    ``exit(features)`` returns ``(logits [N, C], vector [N, D])``; the vector F is what the
    classifier sees (equation 8 compares F of every exit with that of the deepest one).
    """

    def __init__(self, branch: nn.Module, tail: nn.Module, classifier: nn.Module) -> None:
        super().__init__()
        self.branch = branch
        self.tail = tail
        self.classifier = classifier

    def forward(self, features: Any) -> tuple[Tensor, Tensor]:
        vector = self.tail(self.branch(features)).flatten(1)
        return self.classifier(vector), vector


class Stage(nn.Module):
    """A piece of the trunk and the exit behind it.

    ``stage(features, logits)`` returns ``(features, logits + [new])``. With a third argument, a
    list of vectors, it returns that list with the exit's own vector appended as a third result.
    The lists passed in are not changed.
    """

    def __init__(self, trunk: nn.Module, exit: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk
        self.exit = exit

    def forward(self, features: Any, logits: list[Tensor], vectors: list[Tensor] | None = None):
        features = self.trunk(features)
        new, vector = self.exit(features)
        if vectors is None:
            return features, [*logits, new]
        return features, [*logits, new], [*vectors, vector]


class MultiExitNetwork(nn.Module):
    """K stages in a row: the trunk is run once, every exit answers.

    ``model(x)`` returns the K logits [N, C], shallow to deep; ``model(x, features=True)`` returns
    ``(logits, features)`` with the K vectors [N, D_k] in front of the classifiers. The first
    stage takes x itself. ``model.exits`` is K.
    """

    def __init__(self, stages: Iterable[nn.Module]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        if not self.stages:
            raise ValueError("MultiExitNetwork: there must be at least one stage; got none")

    @property
    def exits(self) -> int:
        return len(self.stages)

    def forward(self, x: Any, features: bool = False):
        logits: list[Tensor] = []
        vectors: list[Tensor] = []
        for stage in self.stages:
            if features:
                x, logits, vectors = stage(x, logits, vectors)
            else:
                x, logits = stage(x, logits)
        return (logits, vectors) if features else logits

# SPDX-License-Identifier: Apache-2.0
"""Other projects' kernels for parts of the job, where they can be imported; they need a GPU.

None of them takes K exits at once, so each is composed pair by pair. A kernel that writes its
gradient over the logits is given a copy of them, as a multi-exit network must give it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .problem import Problem


def _pairs(problem: Problem, cross_entropy: Any, divergence: Any) -> Tensor:
    """CE per exit on a copy of its logits, KL per pair from shared log-probabilities."""
    t = problem.recipe.temperature
    everyone = (*problem.logits, *problem.teachers)
    log_q = [F.log_softmax(z.float() / t, dim=1) for z in everyone]
    loss = problem.logits[0].new_zeros((), dtype=log_q[0].dtype)
    for z in problem.logits:
        loss = loss + cross_entropy(z.clone(), problem.target)
    for i, row in enumerate(problem.recipe.weights):
        for j, weight in enumerate(row):
            if weight:
                loss = loss + weight * t * t * divergence(log_q[i], log_q[j].detach())
    return loss


def _liger(problem: Problem) -> Callable[[], Tensor]:
    module = importlib.import_module("liger_kernel.transformers")
    cross_entropy = module.LigerCrossEntropyLoss()
    divergence = module.LigerKLDIVLoss(reduction="batchmean", log_target=True)
    return lambda: _pairs(problem, cross_entropy, divergence)


def _fla(problem: Problem) -> Callable[[], Tensor]:
    module = importlib.import_module("fla.modules")
    cross_entropy = module.FusedCrossEntropyLoss()

    def divergence(student: Tensor, teacher: Tensor) -> Tensor:
        return F.kl_div(student, teacher, reduction="batchmean", log_target=True)

    return lambda: _pairs(problem, cross_entropy, divergence)


PEERS = {"liger": _liger, "fla": _fla}


def available(problem: Problem) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Every peer that can be imported here and has a kernel for the loss."""
    if problem.case.family != "loss":
        return
    for name, build in PEERS.items():
        try:
            yield name, build(problem)
        except ImportError:
            continue

# SPDX-License-Identifier: Apache-2.0
"""What share of a training step the loss takes: with msdkern, plain PyTorch and torch.compile."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import msdkern
from msdkern.cli import CommandError
from msdkern.train import data
from msdkern.train.config import TrainConfig
from msdkern.train.report import aligned
from msdkern.train.run import Run, choose_executor, cpu_threads

Loss = Callable[[list[Tensor], Tensor], Tensor]
ROUNDS, BLOCK = 30, 5

# divergence: value of one student and one teacher, [N, C] log-probabilities and probabilities
PLAIN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "forward_kl": lambda student, teacher: F.kl_div(student, teacher, reduction="batchmean"),
    "soft_ce": lambda student, teacher: -(teacher * student).sum(1).mean(),
}


def profile_loss(config: TrainConfig) -> dict[str, Any]:
    """Seconds of the network and of the loss in one training step, medians on a real batch.

    The loss is cross entropies and divergences, forward and backward down to the logits; the
    network is everything else: forward, backward from the logits, and the optimiser's step.
    A feature term, which is plain PyTorch in all three, is left out. The contenders take turns
    in blocks whose first call is dropped, and must agree on the value before they are timed.

    Returns ``{"network": s, "loss": {"msdkern", "eager", "compiled"}, "share": {...}}``.
    """
    dataset = data.load(config)
    with choose_executor(config.executor), cpu_threads(config, dataset):
        run = Run(config, dataset)
        images, labels = next(run.batches.epoch(0))
        run.model.train()
        with torch.autocast(run.device.type, torch.bfloat16, enabled=config.amp):
            logits = [z.detach() for z in run.engine.network(images)]
        plain = plain_loss(run.criterion, len(logits), config.loss)
        losses: dict[str, Loss] = {
            "msdkern": fused_loss(run.criterion),
            "eager": plain,
            "compiled": torch.compile(plain),
        }
        check_agreement(losses, logits, labels)
        grads = [torch.ones_like(z) / z.numel() for z in logits]
        tasks: dict[str, Callable[[], object]] = {
            name: partial(backward, loss, logits, labels) for name, loss in losses.items()
        }
        tasks["network"] = partial(network_step, run, images, grads)
        seconds = interleaved(tasks, run.device)
    network = seconds.pop("network")
    share = {name: value / (network + value) for name, value in seconds.items()}
    return {"network": network, "loss": seconds, "share": share}


def fused_loss(criterion: Any) -> Loss:
    """The criterion's `msdkern.multi_exit_loss`, without its feature term."""

    def loss(logits: list[Tensor], labels: Tensor) -> Tensor:
        weight = criterion.exit_weight
        if weight is not None and weight.dim() == 0:
            weight = weight.expand(len(logits))
        return msdkern.multi_exit_loss(
            logits,
            labels,
            exit_weight=weight,
            pair_weight=criterion.pair_name or criterion.pair_weight,
            pair_scale=criterion.pair_scale,
            temperature=criterion.temperature,
            **criterion.options,
        ).loss

    return loss


def plain_loss(criterion: Any, exits: int, name: str) -> Loss:
    """The same loss as one writes it in PyTorch: a loop over exits and a loop over pairs."""
    options = criterion.options
    if criterion.teacher != "external" or options["divergence"] not in PLAIN:
        raise CommandError(f"--profile-loss: has no plain PyTorch form of --loss {name}")
    temperature = float(criterion.temperature)
    scale = float(criterion.pair_scale)
    scale *= temperature**2 if options["temperature_squared"] else 1.0
    divergence = PLAIN[options["divergence"]]
    label_weight = weights_of(criterion.exit_weight, exits)
    pairs = pair_list(criterion, exits)

    def loss(logits: list[Tensor], labels: Tensor) -> Tensor:
        terms = [
            a * F.cross_entropy(z.float(), labels)
            for a, z in zip(label_weight, logits, strict=True)
        ]
        for i, j, weight in pairs:
            student = F.log_softmax(logits[i].float() / temperature, dim=1)
            teacher = F.softmax(logits[j].detach().float() / temperature, dim=1)
            terms.append(scale * weight * divergence(student, teacher))
        return torch.stack(terms).sum()

    return loss


def weights_of(weight: Tensor | None, exits: int) -> list[float]:
    """One number per exit."""
    if weight is None:
        return [1.0] * exits
    return weight.expand(exits).tolist() if weight.dim() == 0 else weight.tolist()


def pair_list(criterion: Any, exits: int) -> list[tuple[int, int, float]]:
    """Student, teacher and weight of every pair that counts."""
    matrix = criterion.pair_weight
    if criterion.pair_name:
        matrix = getattr(msdkern.pairs, criterion.pair_name)(exits)
    if matrix is None:
        return []
    rows = matrix.tolist()
    return [(i, j, w) for i, row in enumerate(rows) for j, w in enumerate(row) if w != 0]


def backward(loss: Loss, logits: list[Tensor], labels: Tensor) -> Tensor:
    """Forward and backward of a loss down to the logits; returns its value."""
    leaves = [z.requires_grad_() for z in (z.detach() for z in logits)]
    value = loss(leaves, labels)
    value.backward()
    return value.detach()


def network_step(run: Run, images: Tensor, grads: list[Tensor]) -> None:
    """A training step whose loss costs nothing: its gradients are given."""
    with torch.autocast(run.device.type, torch.bfloat16, enabled=run.config.amp):
        logits = run.engine.network(images)
    torch.autograd.backward(logits, grads)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)


def check_agreement(losses: dict[str, Loss], logits: list[Tensor], labels: Tensor) -> None:
    """A fast wrong loss must not be reported."""
    values = {name: float(backward(loss, logits, labels)) for name, loss in losses.items()}
    truth = values["eager"]
    if any(abs(value - truth) > 1e-3 * abs(truth) + 1e-5 for value in values.values()):
        raise CommandError(f"--profile-loss: the losses disagree: {values}")


def interleaved(tasks: dict[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    """Median seconds of every task; they take turns in blocks whose first call is dropped."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(ROUNDS):
        for name, task in tasks.items():
            for call in range(BLOCK):
                started = time.perf_counter()
                task()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                if call > 0:
                    seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def profile_table(shares: dict[str, Any]) -> str:
    """The result of `profile_loss` as aligned text."""
    words = {"eager": "plain PyTorch", "compiled": "torch.compile", "msdkern": "msdkern"}
    rows = [("loss computed by", "loss", "network", "share of the step")]
    rows += [
        (
            words[name],
            f"{1e3 * shares['loss'][name]:.3f} ms",
            f"{1e3 * shares['network']:.3f} ms",
            f"{100 * shares['share'][name]:.1f} %",
        )
        for name in words
    ]
    return "\n".join(aligned(rows))

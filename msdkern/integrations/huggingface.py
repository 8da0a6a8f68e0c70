# SPDX-License-Identifier: Apache-2.0
"""Hugging Face's Trainer: a network that answers as it expects, and its loss in one argument.

::

    Trainer(MultiExitModel(network), args, compute_loss_func=compute_loss_func(criterion), ...)

The Trainer scales nothing for gradient accumulation when it is given a loss: it counts the valid
labels of all batches of a step, and the loss divides by that. With
``average_tokens_across_devices`` the count is that of all processes, and the Trainer undoes the
mean that DDP takes by multiplying the loss; without it every process divides by its own labels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from transformers.utils import ModelOutput

from msdkern.nn import MultiExitLoss


@dataclass
class MultiExitOutput(ModelOutput):
    """``logits`` of the deepest exit, ``exit_logits`` of all K, ``exit_features`` if asked for."""

    logits: Tensor | None = None
    exit_logits: tuple[Tensor, ...] | None = None
    exit_features: tuple[Tensor, ...] | None = None


class MultiExitModel(nn.Module):
    """A `MultiExitNetwork` called as ``model(pixel_values=..., labels=...)``."""

    def __init__(self, network: nn.Module, features: bool = False) -> None:
        super().__init__()
        self.network, self.features = network, features

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> MultiExitOutput:
        if not self.features:
            logits = tuple(self.network(pixel_values))
            return MultiExitOutput(logits[-1], logits)
        logits, vectors = map(tuple, self.network(pixel_values, features=True))
        return MultiExitOutput(logits[-1], logits, vectors)


def compute_loss_func(criterion: MultiExitLoss) -> Callable[..., Tensor]:
    """The Trainer's ``compute_loss_func``: any output with ``exit_logits`` will do.

    Without a count (``num_items_in_batch=None``) the loss is that of the batch by itself.
    Raises ``ValueError`` for an output without ``exit_logits``.
    """

    def compute_loss(
        outputs: Mapping, labels: Tensor | None, num_items_in_batch: int | Tensor | None = None
    ) -> Tensor:
        if outputs.get("exit_logits") is None:
            rule = "compute_loss_func: the model's output must hold exit_logits"
            raise ValueError(f"{rule}; got {', '.join(outputs)}")
        exits, features = outputs["exit_logits"], outputs.get("exit_features")
        return criterion(exits, labels, features, normalizer=num_items_in_batch)

    return compute_loss

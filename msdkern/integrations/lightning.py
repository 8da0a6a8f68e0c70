# SPDX-License-Identifier: Apache-2.0
"""Lightning: a module that trains any multi-exit network with any loss of `msdkern.nn`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor, nn

from msdkern.integrations import answers, exit_terms
from msdkern.nn import MultiExitLoss


class MultiExitModule(LightningModule):
    """Trains on batches ``(images, labels)`` and logs the loss and its terms at every exit.

    Args:
        model: a `MultiExitNetwork`.
        criterion: of `msdkern.nn`; its schedule follows the progress of the trainer.
        optimizer: ``optimizer(parameters)`` gives what ``configure_optimizers`` may return.

    Lightning divides by ``accumulate_grad_batches`` itself: batches count alike, however many of
    their rows are ignored.
    """

    def __init__(
        self, model: nn.Module, criterion: MultiExitLoss, optimizer: Callable[[Any], Any]
    ) -> None:
        super().__init__()
        self.model, self.criterion, self.optimizer = model, criterion, optimizer

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters())

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        total = self.trainer.estimated_stepping_batches
        self.criterion.set_progress(min(self.global_step / total, 1.0))
        return self._step(batch, "train/")

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        self._step(batch, "val/")

    def _step(self, batch: tuple[Tensor, Tensor], prefix: str) -> Tensor:
        images, labels = batch
        logits, features = answers(self.model, self.criterion, images)
        loss = self.criterion(logits, labels, features)
        terms = {f"{prefix}loss": loss.detach(), **exit_terms(self.criterion, prefix)}
        self.log_dict(terms, batch_size=len(labels))
        return loss

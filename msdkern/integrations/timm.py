# SPDX-License-Identifier: Apache-2.0
"""timm: a training task, with its hooks for DDP, compilation, averages of weights, checkpoints."""

from __future__ import annotations

from typing import Any, cast

from timm.task import ClassificationEvaluator, ClassificationTask
from torch import Tensor, nn

from msdkern.integrations import answers, exit_terms
from msdkern.nn import MultiExitLoss


class MultiExitTask(ClassificationTask):
    """``task(input, target)``: ``loss``, ``output`` of the deepest exit, every exit's terms.

    Args:
        model: a `MultiExitNetwork`.
        criterion: of `msdkern.nn`. Call its ``set_progress`` if it has a schedule.
        options: of `timm.task.TrainingTask`: device, dtype, verbose.
    """

    def __init__(self, model: nn.Module, criterion: MultiExitLoss, **options: Any) -> None:
        super().__init__(model, criterion, **options)

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        criterion = cast(MultiExitLoss, self.criterion)
        logits, features = answers(self.trainable_module, criterion, input)
        loss = criterion(logits, target, features)
        return {"loss": loss, "output": logits[-1], **exit_terms(criterion)}

    def create_evaluator(self, **options: Any) -> ClassificationEvaluator:
        """timm's own, which judges the deepest exit."""
        return DeepestExit(device=self.device, **options)


class DeepestExit(ClassificationEvaluator):
    def update(self, output: Any, target: Tensor) -> None:
        super().update(output[-1], target)

# SPDX-License-Identifier: Apache-2.0
"""torchdistill: a registered loss that reads the exits where its configuration says they are.

::

    model:
      forward_proc: 'forward_batch_only'
      forward_hook: {output: [&exit1 stages.0.exit.classifier, &exit2 stages.1.exit.classifier]}
    criterion:
      key: 'WeightedSumLoss'
      kwargs:
        sub_terms:
          exits:
            criterion:
              key: 'MultiExitLoss'
              kwargs: {exits: [*exit1, *exit2], loss: 'msd', alpha: 0.1, temperature: 3.0}
            weight: 1.0

Import this module (``dependencies`` of the configuration) to register the loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torchdistill.losses.registry import register_mid_level_loss

from msdkern.nn import create


@register_mid_level_loss(key="MultiExitLoss")
class ExitsLoss(nn.Module):
    """`msdkern.nn.create` on module outputs.

    Args:
        exits: paths of the student's K classifiers, shallow to deep; hook their outputs, and
            their inputs too if the loss has a feature term.
        loss: a name of `msdkern.nn.names()`.
        teachers: paths of modules of the teacher that answer, for a loss that needs them.
        options: of that loss.
    """

    def __init__(
        self, exits: Sequence[str], loss: str = "msd", teachers: Sequence[str] = (), **options: Any
    ) -> None:
        super().__init__()
        self.exits, self.teachers = list(exits), list(teachers)
        self.criterion = create(loss, exits=len(self.exits), **options)

    def forward(
        self,
        student_io_dict: Mapping,
        teacher_io_dict: Mapping,
        targets: Tensor,
        *_: Any,
        **__: Any,
    ) -> Tensor:
        logits = [student_io_dict[path]["output"] for path in self.exits]
        teachers = [teacher_io_dict[path]["output"] for path in self.teachers] or None
        features = None
        if self.criterion.needs_features:
            features = [student_io_dict[path]["input"] for path in self.exits]
        return self.criterion(logits, targets, features, teachers)

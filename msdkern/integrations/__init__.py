# SPDX-License-Identifier: Apache-2.0
"""msdkern in other people's trainers: one module per framework, imported only when asked for.

Plain PyTorch and Accelerate need none: ``criterion(model(x), y)`` is all there is to write.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from msdkern.nn import MultiExitLoss


def answers(
    model: nn.Module, criterion: MultiExitLoss, images: Tensor
) -> tuple[Sequence[Tensor], Sequence[Tensor] | None]:
    """``(logits, features)`` of a `MultiExitNetwork`; features only where the loss needs them."""
    if not criterion.needs_features:
        return model(images), None
    answered = model(images, features=True)
    # Anything else is for the criterion to name.
    return answered if isinstance(answered, tuple) else (answered, None)


def exit_terms(criterion: MultiExitLoss, prefix: str = "") -> dict[str, Tensor]:
    """The last call's terms by name, ``cross_entropy_1`` ... ``divergence_K``: detached scalars."""
    return {
        f"{prefix}{name}_{k}": value
        for name in ("cross_entropy", "divergence")
        for k, value in enumerate(criterion.terms[name], 1)
    }

# SPDX-License-Identifier: Apache-2.0
"""What each exit costs, in multiply-adds for one sample."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from msdkern.models.exits import evaluation


def multiply_adds(model: nn.Module, input_shape: Sequence[int]) -> list[int]:
    """Cumulative multiply-adds up to each exit, for ONE sample of shape ``input_shape``.

    Exit k costs the trunk up to its stage and the branches of all exits up to and including k,
    since a row that leaves at k has been asked at every exit before. Convolutions, matrix
    products and attention are counted (half of what `torch.utils.flop_counter` reports);
    normalisation, activations and pooling are not. The stages run on meta tensors, in evaluation
    mode: nothing is computed, and the model is left as it was.

    Args:
        model: has ``stages``, a list of modules ``(features, logits) -> (features, logits)``.
        input_shape: one sample without the batch axis, e.g. (3, 32, 32).

    Raises:
        TypeError: when the model has no stages.
    """
    stages = getattr(model, "stages", None)
    if stages is None:
        name = type(model).__name__
        raise TypeError(f"multiply_adds: the model must have stages; got {name}")
    parameter = next(model.parameters(), torch.empty(0))
    features: Tensor = torch.empty((1, *input_shape), dtype=parameter.dtype, device="meta")
    logits: list[Tensor] = []
    costs = []
    with evaluation(model), torch.no_grad(), FlopCounterMode(display=False) as counter:
        for stage in stages:
            arguments = (features, logits)
            features, logits = torch.func.functional_call(stage, _meta(stage), arguments)
            costs.append(counter.get_total_flops() // 2)
    return costs


def _meta(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers as meta tensors: shapes without storage."""
    state = [*module.named_parameters(), *module.named_buffers()]
    return {name: torch.empty_like(tensor, device="meta") for name, tensor in state}

# SPDX-License-Identifier: Apache-2.0
"""Multi-exit models: `create` one by name, or `add_exits` to a backbone of your own."""

from __future__ import annotations

from typing import Any

from msdkern.models import resnet
from msdkern.models.cost import multiply_adds
from msdkern.models.exits import Parts, add_exits, he_initialize
from msdkern.models.multi_exit import Exit, MultiExitNetwork, Stage
from msdkern.models.resnet import ResNet

__all__ = [
    "Exit",
    "MultiExitNetwork",
    "Parts",
    "ResNet",
    "Stage",
    "add_exits",
    "create",
    "he_initialize",
    "multiply_adds",
    "names",
]


def names() -> tuple[str, ...]:
    """The names that `create` knows."""
    return tuple(resnet.TABLE)


def create(name: str, num_classes: int, in_channels: int = 3, **options: Any) -> MultiExitNetwork:
    """A multi-exit network by name, with fresh weights.

    Args:
        name: one of `names()`: residual networks for small images (8x8 and up).
        num_classes, in_channels: sizes of the answer and of the input.
        options: ``width``, channels of the first group (16; 64 for resnet18 and resnet34); ``at``,
            ``blocks``, ``example``, ``initialize`` as in `add_exits`. By default every group has
            an exit, whose branch is sampled from the later groups.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in resnet.TABLE:
        raise ValueError(f"create: name must be one of {', '.join(names())}; got {name!r}")
    blocks, width = resnet.TABLE[name]
    width = options.pop("width", width)
    return add_exits(ResNet(blocks, num_classes, in_channels, width), **options)

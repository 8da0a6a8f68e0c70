# SPDX-License-Identifier: Apache-2.0
"""Multi-exit models: `create` one by name, or `add_exits` to a backbone of your own."""

from __future__ import annotations

from typing import Any

from msdkern.models import msdnet, ranet, resnet
from msdkern.models.cost import multiply_adds
from msdkern.models.exits import Parts, add_exits, he_initialize
from msdkern.models.msdnet import MSDNetConfig
from msdkern.models.multi_exit import Exit, MultiExitNetwork, Stage
from msdkern.models.ranet import RANetConfig
from msdkern.models.resnet import ResNet

__all__ = [
    "Exit",
    "MSDNetConfig",
    "MultiExitNetwork",
    "Parts",
    "RANetConfig",
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
    return (*resnet.TABLE, *msdnet.TABLE, *ranet.TABLE)


def create(name: str, num_classes: int, in_channels: int = 3, **options: Any) -> MultiExitNetwork:
    """A multi-exit network by name, with fresh weights.

    Args:
        name: one of `names()`: residual networks for small images (8x8 and up).
        num_classes, in_channels: sizes of the answer and of the input.
        options: ``at``, the groups or blocks (0-based) that have an exit, default all; ``width``,
            channels of the first group or scale. For the residual networks also ``blocks``,
            ``example``, ``initialize`` as in `add_exits`: by default the branch of an exit is
            sampled from the later groups. For the others any field of their configuration.

    Raises:
        ValueError: for an unknown name, and for sizes that do not fit together.
        TypeError: for an unknown option.
    """
    for family in (msdnet, ranet):
        if name in family.TABLE:
            return family.create(name, num_classes, in_channels, **options)
    if name not in resnet.TABLE:
        raise ValueError(f"create: name must be one of {', '.join(names())}; got {name!r}")
    blocks, width = resnet.TABLE[name]
    width = options.pop("width", width)
    return add_exits(ResNet(blocks, num_classes, in_channels, width), **options)

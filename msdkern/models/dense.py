# SPDX-License-Identifier: Apache-2.0
"""What MSDNet and RANet are made of: units, the pyramid that feeds them, their exits.

A stage of theirs hands a tuple of maps to the next one. The last map of the tuple is the one that
the exit reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from msdkern.models.exits import he_initialize, places
from msdkern.models.multi_exit import Exit, MultiExitNetwork, Stage

STEMS = ("small", "imagenet")


def unit(in_channels: int, channels: int, size: int, stride: int = 1) -> nn.Sequential:
    """Convolution, batch normalisation, ReLU."""
    conv = nn.Conv2d(in_channels, channels, size, stride, padding=size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU(inplace=True))


def bottleneck(in_channels: int, channels: int, factor: int, stride: int = 1) -> nn.Sequential:
    """A 1x1 unit down to at most ``factor * channels``, then a 3x3 unit."""
    inner = min(in_channels, factor * channels)
    return nn.Sequential(unit(in_channels, inner, 1), unit(inner, channels, 3, stride))


def stem(kind: str, in_channels: int, channels: int) -> nn.Sequential:
    """The first convolution: 3x3 for small images, for ImageNet 7x7 and pooling to a quarter."""
    if kind == "small":
        return unit(in_channels, channels, 3)
    return unit(in_channels, channels, 7, 2).append(nn.MaxPool2d(3, 2, 1))


class Pyramid(nn.Module):
    """The first layer: image -> tuple of maps, fine to coarse, each made from the one before.

    ``strides[s]`` is that of the 3x3 unit between map s and map s + 1.
    """

    def __init__(
        self, kind: str, in_channels: int, widths: Sequence[int], strides: Sequence[int]
    ) -> None:
        super().__init__()
        units = [stem(kind, in_channels, widths[0])]
        for before, width, stride in zip(widths, widths[1:], strides, strict=False):
            units.append(unit(before, width, 3, stride))
        self.units = nn.ModuleList(units)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        maps = []
        for layer in self.units:
            x = layer(x)
            maps.append(x)
        return tuple(maps)


class LastMap(nn.Module):
    """The map that the exit reads."""

    def forward(self, maps: tuple[Tensor, ...]) -> Tensor:
        return maps[-1]


def make_exit(in_channels: int, num_classes: int, channels: int | None) -> Exit:
    """Two strided 3x3 units of ``channels`` (None: as many as come in), pooling, classifier."""
    width = channels or in_channels
    branch = nn.Sequential(LastMap(), unit(in_channels, width, 3, 2), unit(width, width, 3, 2))
    return Exit(branch, nn.AdaptiveAvgPool2d(1), nn.Linear(width, num_classes))


def assemble(
    op: str, blocks: Sequence[tuple[nn.Module, Exit]], at: Sequence[int] | None
) -> MultiExitNetwork:
    """The network of these blocks with exits at ``at`` (default all, the last one always).

    A block without exit belongs to the stage of the next block that has one. Weights are drawn as
    in the published code: He's for convolutions, no bias at first.
    """
    stages, start = [], 0
    for k in places(op, at, len(blocks)):
        trunk = nn.Sequential(*(block for block, _ in blocks[start : k + 1]))
        stages.append(Stage(trunk, blocks[k][1]))
        start = k + 1
    network = MultiExitNetwork(stages)
    return network.apply(initialize)


def initialize(module: nn.Module) -> None:
    """He initialisation of convolutions by fan-out; classifiers start without bias."""
    he_initialize(module)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


def check(op: str, config: Any, step_modes: Sequence[str]) -> None:
    """What both configurations must satisfy. Raises ``ValueError`` with one sentence."""
    for name, value in vars(config).items():
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int) and number < 1:
                raise ValueError(f"{op}: {name} must be positive; got {value}")
    choices = {"step_mode": step_modes, "stem": STEMS}
    for name, known in choices.items():
        if getattr(config, name) not in known:
            rule = f"{op}: {name} must be one of {', '.join(known)}"
            raise ValueError(f"{rule}; got {getattr(config, name)!r}")
    if len(config.bottlenecks) != len(config.factors) or not config.factors:
        rule = f"{op}: factors and bottlenecks must have one entry per scale"
        raise ValueError(f"{rule}; got {config.factors} and {config.bottlenecks}")
    if not 0 < config.reduction <= 1:
        raise ValueError(f"{op}: reduction must be in (0, 1]; got {config.reduction}")

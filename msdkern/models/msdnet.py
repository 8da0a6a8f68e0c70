# SPDX-License-Identifier: Apache-2.0
"""MSDNet, multi-scale dense networks (Huang et al., 1703.09844, section 4).

Every layer holds maps at S scales. Scale s grows by features of its own map and, strided, of the
finer one, and keeps all that came before (dense connectivity). Exits read the coarsest map, so
even the first one sees features of low resolution. The depth is cut into S equal spans: after
each of them the finest scale is dropped and a 1x1 unit, the transition, reduces the channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from msdkern.models.dense import Pyramid, assemble, bottleneck, check, make_exit, unit
from msdkern.models.multi_exit import MultiExitNetwork


@dataclass(frozen=True)
class MSDNetConfig:
    """The shape of an MSDNet. Channels at scale s (0 is the finest) are multiples of factors[s].

    Raises ``ValueError`` when the numbers do not fit together.
    """

    exits: int  # blocks, each of which ends in an exit
    base: int  # layers before the first exit
    step: int  # layers between exits: step (even), or step * k + 1 before exit k = 1.. (lin_grow)
    step_mode: str = "even"
    width: int = 16  # channels of the first layer, times factors[s]
    growth: int = 6  # channels that a layer adds, times factors[s]
    factors: tuple[int, ...] = (1, 2, 4)
    bottlenecks: tuple[int, ...] = (1, 2, 4)  # inner channels per new channel, by input scale
    reduction: float = 0.5  # channels that a transition keeps
    stem: str = "small"
    exit_channels: int | None = 128  # of the exits' convolutions; None: as many as they read

    def __post_init__(self) -> None:
        check("msdnet", self, ("even", "lin_grow"))
        if any(self.growth * factor % 2 for factor in self.factors[1:]):
            rule = "msdnet: growth * factor must be even at every scale but the finest"
            raise ValueError(f"{rule}; got growth={self.growth}, factors={self.factors}")

    @property
    def steps(self) -> list[int]:
        """Layers of every block."""
        even = self.step_mode == "even"
        later = [self.step if even else self.step * k + 1 for k in range(1, self.exits)]
        return [self.base, *later]


_IMAGENET = MSDNetConfig(
    exits=5,
    base=4,
    step=4,
    width=32,
    growth=16,
    factors=(1, 2, 4, 4),
    bottlenecks=(1, 2, 4, 4),
    stem="imagenet",
    exit_channels=None,
)

# Without a note: the configurations of the authors' PyTorch code.
TABLE: dict[str, MSDNetConfig] = {
    "msdnet": MSDNetConfig(exits=7, base=4, step=2),  # anytime prediction on CIFAR
    "msdnet_anytime10": MSDNetConfig(exits=10, base=4, step=2),  # of the Lua code
    "msdnet_anytime11": MSDNetConfig(exits=11, base=4, step=2),  # of the paper
    "msdnet_budgeted": MSDNetConfig(exits=5, base=1, step=1, step_mode="lin_grow"),
    "msdnet_budgeted7": MSDNetConfig(exits=7, base=1, step=1, step_mode="lin_grow"),  # Lua code
    "msdnet_imagenet4": _IMAGENET,  # base=7 puts exit i behind layer 4 * i + 3, as in the paper
    "msdnet_imagenet6": replace(_IMAGENET, base=6, step=6),
    "msdnet_imagenet7": replace(_IMAGENET, base=7, step=7),
    # Ours, to train without a GPU: images of 32x32 in an hour, of 8x8 in seconds.
    "msdnet_small": MSDNetConfig(
        exits=5, base=1, step=1, step_mode="lin_grow", width=8, growth=4, exit_channels=64
    ),
    "msdnet_tiny": MSDNetConfig(exits=3, base=2, step=2, width=8, growth=4, exit_channels=32),
}


class _Layer(NamedTuple):
    """One layer: channels in front of it and behind it, per factor, and scales it keeps."""

    before: int
    scales: int
    after: int
    transition: bool


def _plan(config: MSDNetConfig) -> list[_Layer]:
    """The layers in order; the last ones keep no scale that no exit will see."""
    total, most = sum(config.steps), len(config.factors)
    span = math.ceil(total / most)
    layers: list[_Layer] = []
    channels, scales = config.width, most
    for i in range(total):
        kept = min(most - i // span, total - i)
        after, dropped = channels + config.growth, kept < scales
        if dropped:
            after = max(1, int(config.reduction * after))
        layers.append(_Layer(channels, kept, after, dropped))
        channels, scales = after, kept
    return layers


class Grow(nn.Module):
    """New features of one scale, concatenated behind its map: from the map, and the finer one."""

    def __init__(self, same: nn.Module, down: nn.Module | None) -> None:
        super().__init__()
        self.same = same
        self.down = down

    def forward(self, x: Tensor, finer: Tensor | None) -> Tensor:
        if self.down is None:
            return torch.cat([x, self.same(x)], 1)
        return torch.cat([x, self.down(finer), self.same(x)], 1)


class Layer(nn.Module):
    """One layer at all the scales it keeps: a tuple of maps in, a tuple of maps out.

    The finest scale of the input is dropped by being read only as the finer map of the next one.
    """

    def __init__(self, config: MSDNetConfig, plan: _Layer) -> None:
        super().__init__()
        first = len(config.factors) - plan.scales
        self.scales = nn.ModuleList(
            _grow(config, plan.before, s, has_finer=s > first or plan.transition)
            for s in range(first, len(config.factors))
        )

    def forward(self, maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        dropped = len(maps) - len(self.scales)
        return tuple(
            scale(maps[i], maps[i - 1] if i else None)
            for i, scale in enumerate(self.scales, start=dropped)
        )


def _grow(config: MSDNetConfig, channels: int, scale: int, has_finer: bool) -> Grow:
    factors, inner = config.factors, config.bottlenecks
    new = config.growth * factors[scale]
    if not has_finer:
        return Grow(bottleneck(channels * factors[scale], new, inner[scale]), None)
    half = new // 2
    down = bottleneck(channels * factors[scale - 1], half, inner[scale - 1], 2)
    return Grow(bottleneck(channels * factors[scale], half, inner[scale]), down)


class Transition(nn.Module):
    """A 1x1 unit for every scale."""

    def __init__(self, channels: int, after: int, factors: Sequence[int]) -> None:
        super().__init__()
        self.scales = nn.ModuleList(unit(channels * f, after * f, 1) for f in factors)

    def forward(self, maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(scale(x) for scale, x in zip(self.scales, maps, strict=True))


def _modules(config: MSDNetConfig, plan: _Layer) -> list[nn.Module]:
    layer = Layer(config, plan)
    if not plan.transition:
        return [layer]
    kept = config.factors[len(config.factors) - plan.scales :]
    return [layer, Transition(plan.before + config.growth, plan.after, kept)]


def create(
    name: str,
    num_classes: int,
    in_channels: int = 3,
    at: Sequence[int] | None = None,
    **changes: Any,
) -> MultiExitNetwork:
    """The MSDNet called ``name`` in `TABLE`, with the fields in ``changes`` replaced.

    Args:
        num_classes, in_channels: sizes of the answer and of the input.
        at: blocks (0-based) that keep their exit; default all. The last one has it anyway.
        changes: fields of `MSDNetConfig`.

    Returns:
        MultiExitNetwork: between its stages travels a tuple of maps, fine to coarse. The vectors
        in front of the classifiers have ``exit_channels`` entries; where that is None, as in the
        ImageNet configurations, each exit has its own size, and the hint term of a loss (which
        compares them) does not apply.

    Raises:
        ValueError: when the numbers do not fit together.
        TypeError: for a field that there is not.
    """
    config = replace(TABLE[name], **changes)
    widths = [config.width * factor for factor in config.factors]
    layers = _plan(config)
    blocks, start = [], 0
    for steps in config.steps:
        part = layers[start : start + steps]
        trunk = [module for plan in part for module in _modules(config, plan)]
        if start == 0:
            pyramid = Pyramid(config.stem, in_channels, widths, [2] * len(widths))
            trunk.insert(0, pyramid)
        channels = part[-1].after * config.factors[-1]
        exit = make_exit(channels, num_classes, config.exit_channels)
        blocks.append((nn.Sequential(*trunk), exit))
        start += steps
    return assemble("msdnet", blocks, at)

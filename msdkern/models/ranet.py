# SPDX-License-Identifier: Apache-2.0
"""RANet, resolution adaptive networks (Yang et al., 2003.07326, section 3).

One sub-network per scale, run from coarse to fine, each made of dense blocks. The blocks that a
finer sub-network has in common with the coarser one before it fuse that one's features, layer by
layer; the blocks beyond end in exits. So easy images never see the finer resolutions, and all
exits read maps of the coarsest one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from msdkern.models.dense import Pyramid, assemble, bottleneck, check, make_exit, unit
from msdkern.models.multi_exit import Exit, MultiExitNetwork

Maps = tuple[Tensor, ...]


@dataclass(frozen=True)
class RANetConfig:
    """The shape of a RANet. Tuples have one entry per sub-network, coarse to fine.

    Raises ``ValueError`` when the numbers do not fit together.
    """

    step: int  # layers of a block: step (even), or step * b in block b = 1.. (lg)
    step_mode: str = "even"
    scales: tuple[int, ...] = (1, 2, 3)  # 1 is the coarsest resolution; each further one doubles
    factors: tuple[int, ...] = (4, 2, 1)  # of width and growth
    bottlenecks: tuple[int, ...] = (4, 2, 1)  # inner channels per new channel
    base: int = 2  # blocks, and so exits, of the coarsest sub-network
    block_step: int = 2  # blocks that each finer one has in addition: its exits
    width: int = 16  # channels of the first layer, times the factor
    growth: int = 6  # channels that a layer adds, times the factor
    compress: float = 0.25  # share of new channels that comes from the coarser sub-network
    reduction: float = 0.5  # channels that a transition keeps
    stem: str = "small"
    exit_channels: int | None = 128  # of the exits' convolutions; None: as many as they read

    def __post_init__(self) -> None:
        check("ranet", self, ("even", "lg"))
        if len(self.scales) != len(self.factors):
            rule = "ranet: scales and factors must have one entry per sub-network"
            raise ValueError(f"{rule}; got {self.scales} and {self.factors}")
        if self.scales[0] != 1 or any(b - a not in (0, 1) for a, b in pairwise(self.scales)):
            raise ValueError(f"ranet: scales must rise from 1 by at most 1; got {self.scales}")
        if not 0 < self.compress < 1 or int(self.growth * min(self.factors) * self.compress) < 1:
            rule = "ranet: compress must be below 1 and leave at least one channel of each layer"
            raise ValueError(f"{rule}; got {self.compress} of {self.growth * min(self.factors)}")


_IMAGENET = RANetConfig(
    step=8,
    scales=(1, 2, 3, 4),
    factors=(4, 2, 1, 1),
    bottlenecks=(4, 2, 1, 1),
    growth=16,
    stem="imagenet",
    exit_channels=None,
)
_WIDE = (4, 2, 2, 1)
_FOUR = (4, 2, 1, 1)

# Without a note: the configurations of the authors' scripts.
TABLE: dict[str, RANetConfig] = {
    "ranet": RANetConfig(step=4, scales=(1, 2, 3, 3), factors=_FOUR, bottlenecks=_FOUR),
    "ranet_lg": RANetConfig(step=2, step_mode="lg"),  # of their README
    "ranet_imagenet": _IMAGENET,
    "ranet_imagenet_wide": replace(_IMAGENET, width=32, factors=_WIDE, bottlenecks=_WIDE),  # too
    # Ours, for images of 8x8.
    "ranet_tiny": RANetConfig(
        step=2,
        scales=(1, 2),
        factors=(2, 1),
        bottlenecks=(2, 1),
        width=8,
        growth=4,
        exit_channels=32,
    ),
}


def _resize(x: Tensor, like: Tensor) -> Tensor:
    size = like.shape[-2:]
    if x.shape[-2:] == size:
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=True)


class Dense(nn.Module):
    """A dense block: ``x -> (result, kept)``.

    ``kept`` is what a finer sub-network will read: the features before the transition, in which
    the output of every layer is a prefix of the channels, ``widths[j]`` of them after j layers.
    """

    kept = 1  # tensors that are kept

    def __init__(
        self, channels: int, growth: int, count: int, factor: int, reduction: float | None
    ) -> None:
        super().__init__()
        self.reduced = reduction is not None
        self.widths: list[int] = [channels + j * growth for j in range(count + 1)]
        self.layers = nn.ModuleList(bottleneck(w, growth, factor) for w in self.widths[:-1])
        self.transition, self.channels = _transition(self.widths[-1], reduction)

    def forward(self, x: Tensor) -> tuple[Tensor, Maps]:
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return self.transition(x), (x,)


class Fuse(nn.Module):
    """A dense block that also reads the block at its place in the coarser sub-network.

    ``(x, low) -> (result, kept)`` with ``low`` what that block kept. With ``halve`` the last
    layer halves the map; then the features before it are kept as well.
    """

    def __init__(
        self,
        channels: int,
        growth: int,
        low: Dense | Fuse,
        factors: tuple[int, int],  # of the bottlenecks: here, and in the coarser sub-network
        compress: float,
        halve: bool,
        reduction: float | None,
    ) -> None:
        super().__init__()
        count, new = len(low.widths) - 1, int(growth * compress)
        self.kept = 2 if halve else 1
        self.widths: list[int] = [channels + j * growth for j in range(count + 1)]
        self.low_widths = low.widths
        self.same, self.up = nn.ModuleList(), nn.ModuleList()
        for j in range(count):
            stride = 2 if halve and j == count - 1 else 1
            self.same.append(bottleneck(self.widths[j], growth - new, factors[0], stride))
            self.up.append(bottleneck(low.widths[j], new, factors[1]))
        whole = self.widths[-1]
        self.last = unit(low.widths[-1], int(whole * compress), 1)
        self.transition, self.channels = _transition(whole + int(whole * compress), reduction)

    def forward(self, x: Tensor, low: Maps) -> tuple[Tensor, Maps]:
        before = x
        for same, up, width in zip(self.same, self.up, self.low_widths[:-1], strict=True):
            before, new = x, same(x)
            coarse = up(low[0][:, :width])
            x = torch.cat([_resize(x, new), _resize(coarse, new), new], 1)
        result = torch.cat([x, _resize(self.last(low[-1]), x)], 1)
        return self.transition(result), (before, x)[-self.kept :]


def _transition(channels: int, reduction: float | None) -> tuple[nn.Module, int]:
    """A 1x1 unit that reduces the channels (None: nothing), and how many come out of it."""
    if reduction is None:
        return nn.Identity(), channels
    after = max(1, int(reduction * channels))
    return unit(channels, after, 1), after


class Block(nn.Module):
    """All between two exits: the fusing blocks, if a sub-network begins here, and a dense block.

    Between stages travel ``(*inputs, *kept, x)``: the pyramid's maps for the finer sub-networks
    (fine to coarse), what the blocks of this one kept for the next, and the map that the exit
    reads. x is left out where it is the last that was kept, with no transition in between. The
    finest sub-network keeps nothing; the first block of each takes its input from the inputs.
    """

    def __init__(
        self,
        inputs: int,  # maps for finer sub-networks
        coarser: Sequence[Dense | Fuse],  # the blocks that the fuses read, if one begins here
        fuses: Sequence[Fuse],
        dense: Dense,
        before: Dense | None,  # the dense block of the same sub-network before this one
    ) -> None:
        super().__init__()
        self.inputs = inputs
        self.reads = [block.kept for block in coarser]
        self.fuses = nn.ModuleList(fuses)
        self.dense = dense
        self.begins = before is None
        self.arrives_kept = before is not None and not before.reduced

    def forward(self, maps: Maps) -> Maps:
        inputs, rest = maps[: self.inputs], maps[self.inputs :]
        if self.begins:
            x, kept = self.fuse(rest[0], rest[1:])
        else:
            x, kept = rest[-1], (rest if self.arrives_kept else rest[:-1])
        x, new = self.dense(x)
        if not inputs:
            return (x,)
        return (*inputs, *kept, *new, *((x,) if self.dense.reduced else ()))

    def fuse(self, x: Tensor, low: Maps) -> tuple[Tensor, Maps]:
        kept: Maps = ()
        for fuse, count in zip(self.fuses, self.reads, strict=True):
            x, new = fuse(x, low[:count])
            low, kept = low[count:], kept + new
        return x, kept


def _sub_network(
    config: RANetConfig, index: int, coarser: Sequence[Dense | Fuse]
) -> tuple[list[Fuse], list[Dense]]:
    """The blocks of one sub-network: those that fuse one of ``coarser`` each, and the others."""
    factor, inner, scale = config.factors[index], config.bottlenecks[index], config.scales[index]
    total = config.base + index * config.block_step
    ends = [config.base + i * config.block_step for i in range(index)]  # of the coarser ones
    halving = ends[index - scale + 1 :]
    reduced = {(i + 1) * total // scale for i in range(scale - 1)}
    channels, growth = config.width * factor, config.growth * factor
    fuses: list[Fuse] = []
    denses: list[Dense] = []
    for b in range(1, total + 1):
        reduction = config.reduction if b in reduced else None
        block: Dense | Fuse
        if b <= len(coarser):
            low, factors = coarser[b - 1], (inner, config.bottlenecks[index - 1])
            halve = b in halving
            block = Fuse(channels, growth, low, factors, config.compress, halve, reduction)
            fuses.append(block)
        else:
            count = config.step * (1 if config.step_mode == "even" else b)
            block = Dense(channels, growth, count, inner, reduction)
            denses.append(block)
        channels = block.channels
    return fuses, denses


def _blocks(config: RANetConfig) -> Iterator[Block]:
    """What lies in front of each exit, the sub-networks from coarse to fine."""
    coarser: list[Dense | Fuse] = []
    for index in range(len(config.scales)):
        fuses, denses = _sub_network(config, index, coarser)
        inputs = len(config.scales) - 1 - index
        yield Block(inputs, coarser, fuses, denses[0], None)
        for before, dense in pairwise(denses):
            yield Block(inputs, [], [], dense, before)
        coarser = [*fuses, *denses]


def create(
    name: str,
    num_classes: int,
    in_channels: int = 3,
    at: Sequence[int] | None = None,
    **changes: Any,
) -> MultiExitNetwork:
    """The RANet called ``name`` in `TABLE`, with the fields in ``changes`` replaced.

    Args:
        num_classes, in_channels: sizes of the answer and of the input.
        at: exits (0-based, of all sub-networks in order) that are kept; default all. The last
            one is kept anyway.
        changes: fields of `RANetConfig`.

    Returns:
        MultiExitNetwork: a tuple of maps travels between its stages (see `Block`). The vectors in
        front of the classifiers have ``exit_channels`` entries; where that is None, as in the
        ImageNet configurations, each exit has its own size, and the hint term of a loss (which
        compares them) does not apply.

    Raises:
        ValueError: when the numbers do not fit together.
        TypeError: for a field that there is not.
    """
    config = replace(TABLE[name], **changes)
    widths = [config.width * factor for factor in reversed(config.factors)]
    strides = [1 + b - a for a, b in pairwise(config.scales)][::-1]
    pyramid = Pyramid(config.stem, in_channels, widths, strides)
    blocks: list[tuple[nn.Module, Exit]] = []
    for block in _blocks(config):
        trunk = nn.Sequential(block) if blocks else nn.Sequential(pyramid, block)
        exit = make_exit(block.dense.channels, num_classes, config.exit_channels)
        blocks.append((trunk, exit))
    return assemble("ranet", blocks, at)

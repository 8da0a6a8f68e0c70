# SPDX-License-Identifier: Apache-2.0
"""Multiply-adds and parameters of MSDNet and RANet, summed by hand from the papers' formulas.

Nothing here looks at a model: a convolution costs in * out * k * k weights, and as many
multiply-adds per pixel of its output. Maps are square; a stride of 2 rounds up.
"""

from dataclasses import dataclass, field
from math import ceil


def half(size):
    return (size + 1) // 2


@dataclass
class Tally:
    """Running sums. ``lines`` has one entry per exit: (multiply-adds, parameters, operations).

    Operations are what the authors' counter prints as FLOPs: multiply-adds, plus one per ReLU,
    per pixel that a pooling reads, and per bias.
    """

    madds: int = 0
    parameters: int = 0
    others: int = 0
    lines: list = field(default_factory=list)

    def unit(self, before, after, kernel, size):
        """Convolution without bias, batch norm, ReLU; ``size`` is that of its output."""
        weights = before * after * kernel * kernel
        self.madds += weights * size * size
        self.parameters += weights + 2 * after
        self.others += after * size * size

    def bottleneck(self, before, after, factor, size, stride=1):
        inner = min(before, factor * after)
        self.unit(before, inner, 1, size)
        self.unit(inner, after, 3, half(size) if stride == 2 else size)

    def stem(self, big, channels, size):
        """The first convolution; returns the size of what comes out of it."""
        if not big:
            self.unit(3, channels, 3, size)
            return size
        self.unit(3, channels, 7, size // 2)
        self.others += 9 * channels * (size // 4) ** 2
        return size // 4

    def exit(self, before, channels, classes, size):
        channels = channels or before
        self.unit(before, channels, 3, half(size))
        self.unit(channels, channels, 3, half(half(size)))
        self.madds += channels * classes
        self.parameters += channels * classes + classes
        self.others += 4 * channels + classes  # 2x2 pooling; biases
        self.lines.append((self.madds, self.parameters, self.madds + self.others))


def msdnet(size, classes, steps, width, growth, factors, inner, exit_channels, big):
    """Section 4 of 1703.09844, with the transitions and exits of the authors' code."""
    tally, scales, depth = Tally(), len(factors), sum(steps)
    sizes = [tally.stem(big, width * factors[0], size)]
    for s in range(1, scales):
        sizes.append(half(sizes[-1]))
        tally.unit(width * factors[s - 1], width * factors[s], 3, sizes[s])
    span, channels, first, layer = ceil(depth / scales), width, 0, 0
    for count in steps:
        for _ in range(count):
            above, first = first, layer // span  # finest scale of the layer before, and of this
            for s in range(first, scales):
                new = growth * factors[s]
                if s == above:  # nothing finer to read
                    tally.bottleneck(channels * factors[s], new, inner[s], sizes[s])
                    continue
                before = channels * factors[s - 1]
                tally.bottleneck(before, new // 2, inner[s - 1], sizes[s - 1], stride=2)
                tally.bottleneck(channels * factors[s], new // 2, inner[s], sizes[s])
            channels += growth
            if first > above:
                for s in range(first, scales):
                    tally.unit(channels * factors[s], channels // 2 * factors[s], 1, sizes[s])
                channels //= 2
            layer += 1
        tally.exit(channels * factors[-1], exit_channels, classes, sizes[-1])
    return tally.lines


def ranet(size, classes, layers, scales, width, growth, factors, inner, exit_channels, big):
    """Section 3 of 2003.07326; ``layers[b]`` of block b, two exits per sub-network.

    A quarter of the new channels comes from the coarser sub-network, as does a 1x1 unit at the
    end of a block that adds a quarter of what the block holds; transitions keep half.
    """
    tally, count = Tally(), len(scales)
    fine = [tally.stem(big, width * factors[-1], size)]
    for s in reversed(range(count - 1)):
        fine.append(fine[-1] if scales[s] == scales[s + 1] else half(fine[-1]))
        tally.unit(width * factors[s + 1], width * factors[s], 3, fine[-1])
    sizes = fine[::-1]
    low = []  # of the coarser sub-network: per block, channels and sizes after 0, 1, .. layers
    for s in range(count):
        channels, here, mine = width * factors[s], sizes[s], []
        total, scale = 2 * s + 2, scales[s]
        transitions = [total * i // scale for i in range(1, scale)]
        halvings = [2 * i for i in range(1, s + 1)][-(scale - 1) :] if scale > 1 else []
        for b in range(1, total + 1):
            rows = [(channels, here)]
            for j in range(layers[b - 1]):
                new = growth * factors[s]
                halve = b in halvings and j == layers[b - 1] - 1
                if b <= len(low):
                    width_low, size_low = low[b - 1][j]
                    tally.bottleneck(width_low, new // 4, inner[s - 1], size_low)
                    new -= new // 4
                tally.bottleneck(channels, new, inner[s], here, stride=2 if halve else 1)
                channels, here = channels + growth * factors[s], half(here) if halve else here
                rows.append((channels, here))
            mine.append(rows)
            if b <= len(low):
                width_low, size_low = low[b - 1][-1]
                tally.unit(width_low, channels // 4, 1, size_low)
                channels += channels // 4
            if b in transitions:
                tally.unit(channels, channels // 2, 1, here)
                channels //= 2
            if b > len(low):
                tally.exit(channels, exit_channels, classes, here)
        low = mine
    return tally.lines

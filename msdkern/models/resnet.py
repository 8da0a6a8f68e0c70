# SPDX-License-Identifier: Apache-2.0
"""Residual networks for small images (He et al., 1512.03385, section 4.2), with one exit.

`add_exits` makes them multi-exit; `create` does both. Shortcuts that change shape are 1x1
convolutions. The 6n + 2 layer family has three groups; resnet18 and resnet34 have four and start
with a 3x3 convolution without pooling, as is usual on 32x32 images.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from msdkern.models.exits import Parts, he_initialize

# name: (blocks in each group, width of the first group)
TABLE: dict[str, tuple[tuple[int, ...], int]] = {
    "resnet8": ((1, 1, 1), 16),
    "resnet14": ((2, 2, 2), 16),
    "resnet20": ((3, 3, 3), 16),
    "resnet32": ((5, 5, 5), 16),
    "resnet56": ((9, 9, 9), 16),
    "resnet110": ((18, 18, 18), 16),
    "resnet18": ((2, 2, 2, 2), 64),
    "resnet34": ((3, 4, 6, 3), 64),
}


def _conv(in_channels: int, channels: int, size: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, channels, size, stride, padding=size // 2, bias=False)


class _Subsample(nn.Module):
    """Every ``stride``-th pixel. Before a 1x1 convolution this equals the convolution's stride.

    It stands apart because oneDNN's weight gradient of a strided 1x1 convolution writes past its
    buffer where channels do not fill a vector register (oneDNN issue 6035).
    """

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, :: self.stride, :: self.stride]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch normalisation around a shortcut."""

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = _conv(in_channels, channels, 3, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = _conv(channels, channels, 3, 1)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                _Subsample(stride), _conv(in_channels, channels, 1, 1), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def _group(in_channels: int, channels: int, count: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, channels, stride)
    return nn.Sequential(first, *(BasicBlock(channels, channels) for _ in range(count - 1)))


class ResNet(nn.Module):
    """Stem, groups of residual blocks, pooling, one classifier: ``model(x) -> [N, num_classes]``.

    Group g has ``width * 2**g`` channels; every group but the first halves the map.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        num_classes: int,
        in_channels: int = 3,
        width: int = 16,
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            _conv(in_channels, width, 3, 1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        )
        widths = [width] + [width * 2**g for g in range(len(blocks))]
        self.groups = nn.ModuleList(
            _group(widths[g], widths[g + 1], count, 1 if g == 0 else 2)
            for g, count in enumerate(blocks)
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(widths[-1], num_classes)
        self.apply(he_initialize)

    @property
    def parts(self) -> Parts:
        """The names by which `add_exits` finds its way."""
        groups = [f"groups.{g}" for g in range(len(self.groups))]
        return Parts(stem="stem", groups=groups, tail="pool", head="classifier")

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for group in self.groups:
            x = group(x)
        return self.classifier(self.pool(x).flatten(1))

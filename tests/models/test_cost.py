# SPDX-License-Identifier: Apache-2.0
"""`multiply_adds` against a count by hand."""

import pytest
import torch
from torch import nn

from msdkern import models


def block(before, after, size):
    """Multiply-adds of a residual block whose output map is size x size."""
    shortcut = before * after if before != after else 0
    return size * size * (9 * before * after + 9 * after * after + shortcut)


def test_resnet8_by_hand():
    stem = 8 * 8 * 9 * 1 * 4
    trunk = [stem + block(4, 4, 8), block(4, 8, 4), block(8, 16, 2)]
    head = 16 * 10
    branch = [block(4, 8, 4) + block(8, 16, 2) + head, block(8, 16, 2) + head, head]
    network = models.create("resnet8", 10, 1, width=4)
    expected = [sum(trunk[: k + 1]) + sum(branch[: k + 1]) for k in range(3)]
    assert models.multiply_adds(network, (1, 8, 8)) == expected


def test_the_published_figure_of_resnet20():
    """ResNet-20 on 32x32 has 41 million multiply-adds: the trunk, with its last classifier."""
    network = models.create("resnet20", 10, at=())
    (cost,) = models.multiply_adds(network, (3, 32, 32))
    assert 40.5e6 < cost < 41.5e6


def test_the_model_is_left_as_it_was():
    network = models.create("resnet8", 10, 1, width=4).train()
    network.stages[0].trunk.eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    models.multiply_adds(network, (1, 4, 4))  # 1x1 maps: batch statistics would not exist
    assert network.training
    assert not network.stages[0].trunk.training
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name])
        assert tensor.device.type == "cpu"


def test_a_model_without_stages_is_refused():
    with pytest.raises(TypeError, match="the model must have stages; got Linear"):
        models.multiply_adds(nn.Linear(2, 2), (2,))

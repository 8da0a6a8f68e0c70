# SPDX-License-Identifier: Apache-2.0
"""The named networks: structure, small inputs, checkpoints, stages, compilation, learning."""

import io

import pytest
import torch
from torch import nn

import msdkern
from msdkern import models
from msdkern.models import resnet

DEPTHS = {name: int(name.removeprefix("resnet")) for name in resnet.TABLE}


@pytest.mark.parametrize("name", resnet.TABLE)
def test_depth_is_in_the_name(name):
    network = models.create(name, 10, width=2)
    weights = [m for s in network.stages for m in s.trunk.modules() if isinstance(m, nn.Conv2d)]
    layers = sum(m.kernel_size == (3, 3) for m in weights) + 1
    assert layers == DEPTHS[name]
    assert network.exits == (4 if name in ("resnet18", "resnet34") else 3)


@pytest.mark.parametrize(("size", "channels"), [(8, 1), (32, 3)])
def test_small_images(size, channels):
    network = models.create("resnet8", 7, in_channels=channels)
    logits, features = network(torch.randn(2, channels, size, size), features=True)
    assert [z.shape for z in logits] == [(2, 7)] * 3
    assert [f.shape for f in features] == [(2, 64)] * 3


def test_initialisation_keeps_the_scale_of_activations():
    torch.manual_seed(0)
    network = models.create("resnet56", 10, width=8)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            assert module.weight.detach().std().item() == pytest.approx(
                (2 / fan_out) ** 0.5, rel=0.4
            )
    logits = network(torch.randn(8, 3, 16, 16))
    assert all(0.01 < z.detach().std() < 10 for z in logits)


def test_stage_by_stage_is_the_model():
    network = models.create("resnet14", 10, width=4).eval()
    x = torch.randn(2, 3, 16, 16)
    expected, vectors = network(x, features=True)
    features, logits = x, []
    for k, stage in enumerate(network.stages):
        before = list(logits)
        features, logits = stage(features, logits)
        assert len(logits) == len(before) + 1 == k + 1
    for a, b in zip(logits, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert len(vectors) == network.exits


def test_a_checkpoint_loads_without_pickled_code():
    torch.manual_seed(0)
    saved = models.create("resnet8", 10, 1, width=4).eval()
    buffer = io.BytesIO()
    torch.save(saved.state_dict(), buffer)
    buffer.seek(0)
    loaded = models.create("resnet8", 10, 1, width=4).eval()
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    x = torch.randn(2, 1, 8, 8)
    for a, b in zip(loaded(x), saved(x), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_compiled_is_eager():
    torch.manual_seed(0)
    network = models.create("resnet8", 4, 1, width=2, at=(1,)).eval()
    # One graph, decomposed; no backend that would need a compiler on the machine of the tests.
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        for a, b in zip(compiled(x), network(x), strict=True):
            torch.testing.assert_close(a, b)


def test_every_exit_learns_from_the_first_steps():
    """Four patterns under noise: msd brings every exit to the top in a few steps."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    patterns = torch.randn(4, 1, 8, 8, generator=generator)
    target = torch.arange(64) % 4
    x = patterns[target] + 0.5 * torch.randn(64, 1, 8, 8, generator=generator)
    network = models.create("resnet8", 4, 1, width=8)
    criterion = msdkern.nn.create("msd", network.exits)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    for step in range(12):
        criterion.set_progress(step / 12)
        logits, features = network(x, features=True)
        loss = criterion(logits, target, features)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for z in network(x):
        assert float((z.argmax(1) == target).float().mean()) > 0.95


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match=r"name must be one of resnet8, .*; got 'resnet9'"):
        models.create("resnet9", 10)

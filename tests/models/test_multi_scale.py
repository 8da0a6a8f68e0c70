# SPDX-License-Identifier: Apache-2.0
"""MSDNet and RANet: wiring, stages, feature vectors, gradients, checkpoints, compilation."""

import io
import math
import re
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import msdkern
from msdkern import models
from msdkern.models import msdnet, ranet
from msdkern.models.dense import Pyramid

TINY = ("msdnet_tiny", "ranet_tiny")
# Odd shapes of each family: uneven factors, one scale, no even split, halvings in two blocks.
SHAPES = {
    "msdnet_tiny": [
        {},
        {"exits": 4, "base": 1, "step": 1, "step_mode": "lin_grow"},
        {"factors": (1, 3, 2, 4), "bottlenecks": (1, 1, 2, 4), "exits": 2, "base": 3},
        {"factors": (2,), "bottlenecks": (4,)},
        {"exits": 1, "base": 1},
    ],
    "ranet_tiny": [
        {},
        {"step_mode": "lg", "step": 1},
        {
            "scales": (1, 2, 2, 3),
            "factors": (4, 2, 1, 1),
            "bottlenecks": (4, 2, 2, 1),
            "base": 1,
            "block_step": 1,
        },
        {"scales": (1, 2, 3), "factors": (4, 2, 1), "bottlenecks": (4, 2, 1), "base": 3},
        {  # a transition between two exits, in front of a finer sub-network
            "scales": (1, 2, 2),
            "factors": (2, 2, 1),
            "bottlenecks": (2, 2, 1),
            "base": 1,
            "block_step": 3,
            "step": 1,
        },
        {"scales": (1,), "factors": (3,), "bottlenecks": (2,)},
    ],
}
EVERY_SHAPE = [(name, changes) for name in TINY for changes in SHAPES[name]]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """On maps as small as these, threads wait for each other longer than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny(name, **changes):
    torch.manual_seed(0)
    network = models.create(name, 7, **changes)
    for module in network.modules():  # statistics that are not those of a fresh layer
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 1.5)
    return network.eval()


# Wiring, written again: every map of every layer is kept in a list, and looked up there. ---------


def msdnet_answers(network, x):
    """Maps by scale; a layer that keeps fewer scales reads the finer ones and drops them."""
    answers, maps = [], None
    for stage in network.stages:
        for block in stage.trunk:
            for part in block:
                if isinstance(part, Pyramid):
                    maps = list(part(x))
                elif isinstance(part, msdnet.Transition):
                    maps = [unit(m) for unit, m in zip(part.scales, maps, strict=True)]
                else:
                    finer = [None, *maps][-len(part.scales) - 1 : -1]
                    own = maps[-len(part.scales) :]
                    maps = [
                        torch.cat([m, *([g.down(f)] if g.down else []), g.same(m)], 1)
                        for g, f, m in zip(part.scales, finer, own, strict=True)
                    ]
        answers.append(stage.exit.classifier(pooled(stage.exit, maps[-1])))
    return answers


def ranet_answers(network, x):
    """All outputs of all layers of a sub-network are kept for the next one."""
    answers, inputs, low, here = [], None, [], []
    for stage in network.stages:
        for part in (part for block in stage.trunk for part in block):
            if isinstance(part, Pyramid):
                inputs = list(part(x))
                continue
            if part.begins:
                low, here, x = here, [], inputs.pop()
            for fuse, outputs in zip(part.fuses, low, strict=bool(part.fuses)):
                here.append([x])
                for same, up, output in zip(fuse.same, fuse.up, outputs, strict=False):
                    new = same(x)
                    x = torch.cat([resized(x, new), resized(up(output), new), new], 1)
                    here[-1].append(x)
                x = fuse.transition(torch.cat([x, resized(fuse.last(outputs[-1]), x)], 1))
            here.append([x])
            for layer in part.dense.layers:
                x = torch.cat([x, layer(x)], 1)
                here[-1].append(x)
            x = part.dense.transition(x)
        answers.append(stage.exit.classifier(pooled(stage.exit, x)))
    return answers


def resized(x, like):
    return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=True)


def pooled(exit, x):
    return exit.branch[2](exit.branch[1](x)).mean((2, 3))


@pytest.mark.parametrize(("name", "changes"), EVERY_SHAPE)
@torch.no_grad()
def test_wiring(name, changes):
    network, x = tiny(name, **changes), torch.randn(2, 3, 16, 16)
    plain = msdnet_answers if name in msdnet.TABLE else ranet_answers
    logits, expected = network(x), plain(network, x)
    assert len(logits) == len(expected) == network.exits
    for a, b in zip(logits, expected, strict=True):
        assert a.shape == (2, 7)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


# Stages ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*TINY, "msdnet_small"])
@torch.no_grad()
def test_stage_by_stage_is_the_model(name):
    network, x = tiny(name), torch.randn(3, 3, 32, 32)
    expected, vectors = network(x, features=True)
    features, logits, seen = x, [], []
    for k, stage in enumerate(network.stages):
        before = list(logits)
        features, logits, seen = stage(features, logits, seen)
        assert isinstance(features, tuple)
        assert len(logits) == len(before) + 1 == k + 1
    for a, b in zip([*logits, *seen], [*expected, *vectors], strict=True):
        assert torch.equal(a, b)
    for vector, stage, z in zip(vectors, network.stages, expected, strict=True):
        assert vector.shape == (3, stage.exit.classifier.in_features)
        assert torch.equal(stage.exit.classifier(vector), z)


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_rows_may_leave_between_stages(name):
    """Every tensor that travels has its rows first, and no row knows of another."""
    network, x = tiny(name), torch.randn(5, 3, 16, 16)
    expected = network(x)
    features, rows = x, torch.arange(5)
    for k, stage in enumerate(network.stages):
        features, (new,) = stage(features, [])
        torch.testing.assert_close(new, expected[k][rows], rtol=1e-4, atol=1e-5)
        rows = rows[::2]
        features = tuple(t[: 2 * len(rows) : 2].contiguous() for t in features)


def test_nothing_travels_in_vain():
    """No tensor between two stages is there twice, and every one serves a later exit."""
    network = tiny("ranet_tiny", **SHAPES["ranet_tiny"][4])
    features = torch.randn(2, 3, 16, 16)
    for k, stage in enumerate(network.stages[:-1], start=1):
        features, _ = stage(features, [])
        features = tuple(t.detach().requires_grad_() for t in features)
        assert len({t.data_ptr() for t in features}) == len(features)
        later, logits = features, []
        for other in network.stages[k:]:
            later, logits = other(later, logits)
        gradients = torch.autograd.grad(sum(z.sum() for z in logits), features)
        assert all(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_fewer_exits_are_the_same_trunk(name):
    full = tiny(name)
    few = tiny(name, at=(1,))
    assert few.exits == 2
    x = torch.randn(2, 3, 16, 16)
    source = {k: list(s.trunk) for k, s in enumerate(full.stages)}
    blocks = [block for k in sorted(source) for block in source[k]]
    for block, new in zip(blocks, [b for s in few.stages for b in s.trunk], strict=True):
        new.load_state_dict(block.state_dict())
    for k, stage in zip((1, full.exits - 1), few.stages, strict=True):
        stage.exit.load_state_dict(full.stages[k].exit.state_dict())
    for a, k in zip(few(x), (1, full.exits - 1), strict=True):
        assert torch.equal(a, full(x)[k])


# Training --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "changes"), EVERY_SHAPE)
def test_gradient_reaches_every_parameter(name, changes):
    network = tiny(name, **changes).train()
    logits, vectors = network(torch.randn(4, 3, 16, 16), features=True)
    loss = sum(F.cross_entropy(z, torch.arange(4)) for z in logits)
    if len(vectors) > 1:
        loss = loss + msdkern.nn.feature_loss(vectors)
    loss.backward()
    for key, parameter in network.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.any(), key


def test_weights_are_drawn_as_published():
    torch.manual_seed(0)
    for name in ("msdnet_small", "ranet_lg"):
        for module in models.create(name, 10).modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.out_channels * module.kernel_size[0] ** 2
                spread = math.sqrt(2 / fan_out)
                few = 4 / math.sqrt(module.weight.numel())
                assert module.bias is None
                assert float(module.weight.detach().std()) == pytest.approx(spread, rel=0.1 + few)
            elif isinstance(module, nn.Linear):
                assert not module.bias.any()


@pytest.mark.parametrize("name", TINY)
def test_every_exit_learns_from_the_first_steps(name):
    """Four patterns under noise: msd brings every exit to the top in a few steps."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    patterns = torch.randn(4, 1, 8, 8, generator=generator)
    target = torch.arange(64) % 4
    x = patterns[target] + 0.5 * torch.randn(64, 1, 8, 8, generator=generator)
    network = models.create(name, 4, 1)
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


# Checkpoints and compilation -------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_a_checkpoint_loads_without_pickled_code(name):
    saved, buffer = tiny(name), io.BytesIO()
    torch.save(saved.state_dict(), buffer)
    buffer.seek(0)
    loaded = models.create(name, 7).eval()
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    x = torch.randn(2, 3, 16, 16)
    for a, b in zip(loaded(x), saved(x), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        (
            "msdnet_tiny",
            {
                "stages.0.trunk.0.0.units.2.0.weight": (32, 16, 3, 3),
                "stages.0.trunk.0.1.scales.0.same.0.0.weight": (4, 8, 1, 1),
                "stages.0.trunk.0.2.scales.2.down.1.1.running_mean": (8,),
                "stages.1.trunk.0.1.scales.1.0.weight": (40, 80, 1, 1),
                "stages.2.exit.branch.2.0.weight": (32, 32, 3, 3),
                "stages.2.exit.classifier.bias": (7,),
            },
        ),
        (
            "ranet_tiny",
            {
                "stages.0.trunk.0.0.units.1.0.weight": (16, 8, 3, 3),
                "stages.1.trunk.0.0.dense.layers.1.0.0.weight": (16, 40, 1, 1),
                "stages.2.trunk.0.0.fuses.0.same.0.1.0.weight": (3, 3, 3, 3),
                "stages.2.trunk.0.0.fuses.1.up.1.0.0.weight": (2, 40, 1, 1),
                "stages.2.trunk.0.0.fuses.1.transition.0.weight": (17, 35, 1, 1),
                "stages.2.trunk.0.0.fuses.0.last.1.bias": (4,),
                "stages.3.exit.branch.1.0.weight": (32, 33, 3, 3),
            },
        ),
    ],
)
def test_the_keys_of_checkpoints_stay(name, keys):
    state = models.create(name, 7).state_dict()
    shapes = {key: tuple(state[key].shape) for key in keys if key in state}
    assert shapes == keys


@pytest.mark.parametrize("name", TINY)
def test_compiled_is_eager(name):
    network = tiny(name)
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        logits, vectors = compiled(x, features=True)
        expected, truth = network(x, features=True)
    for a, b in zip([*logits, *vectors], [*expected, *truth], strict=True):
        torch.testing.assert_close(a, b)


# Sizes and sentences ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size"), [("msdnet_tiny", 8), ("ranet_tiny", 9), ("ranet_lg", 33)]
)
@torch.no_grad()
def test_images_of_other_sizes(name, size):
    assert all(z.isfinite().all() for z in tiny(name, in_channels=1)(torch.randn(2, 1, size, size)))


def test_configurations_are_values():
    config = models.MSDNetConfig(exits=5, base=1, step=1, step_mode="lin_grow")
    assert config == msdnet.TABLE["msdnet_budgeted"]
    assert config.steps == [1, 2, 3, 4, 5]
    assert replace(config, step=2).steps == [1, 3, 5, 7, 9]
    assert msdnet.TABLE["msdnet"].steps == [4, 2, 2, 2, 2, 2, 2]
    with pytest.raises(AttributeError):
        config.exits = 4
    assert ranet.TABLE["ranet_lg"] == models.RANetConfig(step=2, step_mode="lg")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("msdnet", {"exits": 0}, "msdnet: exits must be positive; got 0"),
        ("msdnet", {"factors": (1, 0, 4)}, "msdnet: factors must be positive; got (1, 0, 4)"),
        ("msdnet", {"step_mode": "lg"}, "step_mode must be one of even, lin_grow; got 'lg'"),
        ("msdnet", {"stem": "big"}, "msdnet: stem must be one of small, imagenet; got 'big'"),
        ("msdnet", {"factors": (1, 2)}, "must have one entry per scale; got (1, 2) and (1, 2, 4)"),
        ("msdnet", {"factors": (), "bottlenecks": ()}, "must have one entry per scale; got ()"),
        ("msdnet", {"reduction": 0.0}, "msdnet: reduction must be in (0, 1]; got 0.0"),
        ("msdnet", {"growth": 5, "factors": (1, 1, 2)}, "growth * factor must be even"),
        ("msdnet", {"at": (7,)}, "msdnet: at must be groups between 0 and 6; got (7,)"),
        ("ranet", {"growth": -1}, "ranet: growth must be positive; got -1"),
        ("ranet", {"step_mode": "lin_grow"}, "step_mode must be one of even, lg; got 'lin_grow'"),
        ("ranet", {"scales": (1, 2)}, "one entry per sub-network; got (1, 2) and (4, 2, 1, 1)"),
        ("ranet", {"scales": (1, 2, 4, 4)}, "must rise from 1 by at most 1; got (1, 2, 4, 4)"),
        ("ranet", {"scales": (2, 2, 3, 3)}, "must rise from 1 by at most 1; got (2, 2, 3, 3)"),
        ("ranet", {"compress": 0.1}, "leave at least one channel of each layer; got 0.1 of 6"),
        ("ranet", {"compress": 1.0}, "ranet: compress must be below 1"),
    ],
)
def test_what_does_not_fit_is_refused(name, changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        models.create(name, 10, **changes)


def test_an_unknown_option_is_refused():
    with pytest.raises(TypeError, match="depth"):
        models.create("msdnet", 10, depth=3)

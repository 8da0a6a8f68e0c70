# SPDX-License-Identifier: Apache-2.0
"""Cutting a network: even parts, and tensors that travel over an edge and lose nothing."""

import itertools
import random
from dataclasses import replace

import pytest
import torch

from msdkern import models
from msdkern.cli import CommandError
from msdkern.train import parallel, pipeline
from msdkern.train.config import TrainConfig
from msdkern.train.engines import place


@pytest.mark.parametrize("seed", range(20))
def test_largest_part_is_as_small_as_it_can_be(seed):
    chance = random.Random(seed)
    costs = [chance.randint(1, 9) for _ in range(chance.randint(1, 8))]
    parts = chance.randint(1, len(costs))
    starts = pipeline.even_cuts(list(itertools.accumulate(costs)), parts)

    def largest(cuts):
        return max(sum(costs[a:b]) for a, b in itertools.pairwise([0, *cuts, len(costs)]))

    assert starts[0] == 0
    assert starts[-1] == len(costs)
    assert len(starts) == parts + 1
    assert starts == sorted(set(starts))
    known = min(map(largest, itertools.combinations(range(1, len(costs)), parts - 1)))
    assert largest(starts[1:-1]) == known


@pytest.mark.parametrize(("channels_last", "vectors"), [(False, False), (True, True)])
@pytest.mark.parametrize("name", ["resnet8", "msdnet_tiny", "ranet_tiny"])
def test_parts_in_a_row_are_the_network(name, channels_last, vectors):
    """What arrives is what was promised, and gradients come back over every edge."""
    config = TrainConfig(channels_last=channels_last)
    device, shape = torch.device("cpu"), (3, 8, 8)
    torch.manual_seed(0)
    model = place(models.create(name, 5, 3), device, config).eval()
    images = torch.randn(4, *shape)
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    expected = model(images, features=True)
    starts = pipeline.cuts(model, shape, model.exits)
    loads = pipeline.loads(model, starts, vectors, config, device, shape)
    assert len(loads) == model.exits + 1
    tensors, edges = (pipeline.sent(images, channels_last),), []
    for number, (start, end) in enumerate(itertools.pairwise(starts)):
        last, part = end == model.exits, model.stages[start:end]
        cut = pipeline.Cut(part, loads[number], last, vectors, config, device)
        assert_promised(tensors, loads[number])
        tensors = cut(*tensors)
        if not last:
            tensors = tuple(x.detach().requires_grad_() for x in tensors)
            edges.append(tensors)
    assert_promised(tensors, loads[-1])
    answers = [*expected[0], *expected[1]] if vectors else expected[0]
    for got, answer in zip(tensors, answers, strict=True):
        torch.testing.assert_close(got, answer)
    sum(x.sum() for x in tensors).backward()
    assert all(x.grad is not None for x in edges[-1])


def assert_promised(tensors, load):
    assert [(x.dtype, tuple(x.shape[1:])) for x in tensors] == load.kinds
    for example, x in zip(load.example(4), tensors, strict=True):
        assert example.shape == x.shape
        assert not load.features or example.stride() == x.stride()


def test_what_autocast_computes_travels_in_bfloat16():
    config, device = TrainConfig(amp=True), torch.device("cpu")
    model = models.create("resnet8", 5, 3)
    loads = pipeline.loads(model, [0, 1, 3], False, config, device, (3, 8, 8))
    assert {dtype for dtype, _ in loads[1].kinds[1:]} == {torch.bfloat16}
    assert loads[0].kinds == [(torch.float32, (8, 8, 3))]


@pytest.mark.parametrize(
    ("changes", "processes", "sentence"),
    [
        ({}, 4, "--parallel: pipeline cuts a network between its exits: 4 processes need as many"),
        ({"micro_batches": 3}, 2, "--micro-batches: must divide --batch-size 64; got 3"),
        ({"micro_batches": 1}, 2, "--micro-batches: must be at least the 2 processes; got 1"),
    ],
)
def test_what_cannot_be_cut(monkeypatch, changes, processes, sentence):
    monkeypatch.setattr(parallel, "size", lambda: processes)
    with pytest.raises(CommandError) as error:
        pipeline.check(replace(TrainConfig(parallel="pipeline"), **changes), exits=3)
    assert str(error.value).startswith(sentence)

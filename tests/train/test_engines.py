# SPDX-License-Identifier: Apache-2.0
"""Recomputed activations, and graphs of a whole step, against plain steps."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

import msdkern
from msdkern import models
from msdkern.cli import CommandError
from msdkern.models import Exit, MultiExitNetwork, Stage
from msdkern.train import parallel
from msdkern.train.config import TrainConfig
from msdkern.train.engines import recompute
from msdkern.train.run import GRAPHS_RECOMPUTE, Run, build_criterion

LABELS = torch.tensor([0, 1, 2, -100, 3, -100, -100, 4])


def small(width=6):
    """Two exits, cheap to compile."""
    stages = []
    for size in (3 * 64, width):
        layers = (nn.Flatten(), nn.Linear(size, width), nn.BatchNorm1d(width), nn.ReLU())
        exit = Exit(nn.Identity(), nn.Identity(), nn.Linear(width, 5))
        stages.append(Stage(nn.Sequential(*layers), exit))
    return MultiExitNetwork(stages)


@pytest.fixture
def network():
    torch.manual_seed(0)
    return models.create("resnet8", 5, 3, width=4)


@pytest.fixture
def images():
    return torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def group(tmp_path):
    """A process group of this process alone."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def step(network, images, compiled=None, steps=2):
    """Losses, gradients and running statistics after some forwards and backwards."""
    criterion = msdkern.nn.MSDLoss(alpha=0.3, temperature=2.0)

    def loss(images, labels):
        return criterion(network(images), labels, normalizer=torch.tensor(5.0))

    call = torch.compile(loss, backend=compiled) if compiled else loss
    losses = []
    for _ in range(steps):
        value = call(images, LABELS)
        value.backward()
        losses.append(value.item())
    # DDP puts its own name in front.
    named = {name.removeprefix("module."): p.grad for name, p in network.named_parameters()}
    return losses, named, dict(getattr(network, "module", network).named_buffers())


def assert_same(got, expected, exact=False):
    close = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-4, "atol": 1e-6}
    assert got[0] == pytest.approx(expected[0], rel=0 if exact else 1e-5)
    for left, right in zip(got[1:], expected[1:], strict=True):
        assert left.keys() == right.keys()
        for name, value in right.items():
            torch.testing.assert_close(left[name], value, **close, msg=name)


GRAPH = pytest.param("aot_eager", marks=pytest.mark.skipif(not GRAPHS_RECOMPUTE, reason="refused"))


@pytest.mark.parametrize("compiled", [None, GRAPH])
def test_recomputation_changes_nothing(network, images, compiled):
    """Running statistics see every row once, and count every batch once."""
    network = small() if compiled else network
    other = copy.deepcopy(network)
    recompute(other)
    assert other.state_dict().keys() == network.state_dict().keys()
    expected = step(network, images)
    assert_same(step(other, images, compiled), expected, exact=compiled is None)
    norms = [module for module in other.modules() if hasattr(module, "running_mean")]
    assert norms
    assert all(norm.momentum == 0.1 and int(norm.num_batches_tracked) == 2 for norm in norms)


def test_recomputation_keeps_less(network, images):
    """Of the tensors that a backward needs, only what enters a stage is kept."""

    def kept(network):
        sizes = []
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda x: sizes.append(x.nbytes) or x, lambda x: x
        )
        with hooks:
            network(images)
        return sum(sizes)

    other = copy.deepcopy(network)
    recompute(other)
    assert kept(other) < kept(network) / 4


def test_whole_step_is_compiled_under_ddp(group, images):
    """Network, loss and what DDP adds, in one compiled call."""
    network = small()
    other = copy.deepcopy(network)
    expected = step(network, images)
    wrapped = nn.parallel.DistributedDataParallel(other)
    assert_same(step(wrapped, images, "aot_eager"), expected)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"loss": "phuong_lampert", "loss_option": ("adaptive=true",)}, "adapts its temperature"),
        ({"loss": "msd", "loss_option": ("reduction=sum",)}, "reduction=sum and a feature term"),
        ({"loss": "msd", "loss_option": ("feature_reduction=norm",)}, "feature_reduction=norm"),
        ({"loss": "ce", "loss_option": ("class_weight=[1,2,3]",)}, "class_weight divides by"),
        ({"loss": "ce", "loss_option": ("class_weight=[1,2,3]", "reduction=sum")}, None),
    ],
)
def test_losses_that_processes_cannot_share(monkeypatch, changes, words):
    """One sentence, and none in one process."""
    config = TrainConfig(**changes)
    build_criterion(config, exits=3)
    monkeypatch.setattr(parallel, "size", lambda: 2)
    if words is None:
        build_criterion(config, exits=3)
        return
    with pytest.raises(CommandError, match=words) as error:
        build_criterion(config, exits=3)
    assert "\n" not in str(error.value)


def test_recomputed_graphs_of_old_releases_are_refused(monkeypatch):
    monkeypatch.setattr("msdkern.train.run.GRAPHS_RECOMPUTE", False)
    with pytest.raises(CommandError, match=r"--recompute: together with --compile.*; got 2\."):
        Run(TrainConfig(compile=True, recompute=True), None)

# SPDX-License-Identifier: Apache-2.0
"""`add_exits`: branches, one trunk, foreign backbones, errors."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from msdkern import models
from msdkern.models.exits import evaluation


class Block(nn.Module):
    def __init__(self, before, after):
        super().__init__()
        self.conv = nn.Conv2d(before, after, 3, stride=2, padding=1)
        self.scale = nn.Parameter(torch.full((), 0.5))
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return F.relu(self.conv(x)) * self.scale


class Backbone(nn.Module):
    """A network of somebody else: another vocabulary, flattening inside forward."""

    def __init__(self, widths=(4, 6, 8), answers=5):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.body = nn.Module()
        before = 4
        for name, width in zip("abc", widths, strict=True):
            group = nn.Sequential(Block(before, width), nn.Conv2d(width, width, 1))
            self.body.add_module(name, group)
            before = width
        self.gather = nn.AdaptiveMaxPool2d(1)
        self.answer = nn.Linear(before, answers)

    def forward(self, x):
        x = self.norm(self.first(x))
        for group in self.body.children():
            x = group(x)
        return self.answer(self.gather(x).flatten(1))


PARTS = {
    "stem": ["first", "norm"],
    "groups": ["body.a", "body.b", "body.c"],
    "tail": "gather",
    "head": "answer",
}


@pytest.fixture
def x():
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_own_backbone_gets_branches_of_one_block_per_later_group():
    torch.manual_seed(0)
    backbone = models.ResNet((2, 2, 2, 2), 10, width=4)
    network = models.add_exits(backbone)
    assert network.exits == 4
    assert [len(stage.exit.branch) for stage in network.stages[:-1]] == [3, 2, 1]
    for g, stage in enumerate(network.stages[:-1]):
        for block, group in zip(stage.exit.branch, backbone.groups[g + 1 :], strict=True):
            ours, theirs = (dict(b.named_parameters()) for b in (block, group[0]))
            assert {n: p.shape for n, p in ours.items()} == {n: p.shape for n, p in theirs.items()}
            assert not torch.equal(ours["conv1.weight"], theirs["conv1.weight"])
    logits, features = network(torch.randn(2, 3, 32, 32), features=True)
    assert [z.shape for z in logits] == [(2, 10)] * 4
    assert [f.shape for f in features] == [(2, 32)] * 4


def test_the_deepest_exit_is_the_model_itself():
    backbone = models.ResNet((1, 1, 1), 10, width=4).eval()
    x = torch.randn(2, 3, 16, 16)
    network = models.add_exits(backbone, example=x)
    assert not network.training
    torch.testing.assert_close(network(x)[-1], backbone(x), rtol=0, atol=0)
    with torch.no_grad():
        backbone.classifier.bias.add_(1.0)  # weights are shared, not copied
    torch.testing.assert_close(network(x)[-1], backbone(x), rtol=0, atol=0)


def test_features_are_what_the_classifiers_see():
    network = models.create("resnet8", 10, width=4).eval()
    logits, features = network(torch.randn(2, 3, 16, 16), features=True)
    for stage, z, f in zip(network.stages, logits, features, strict=True):
        torch.testing.assert_close(stage.exit.classifier(f), z, rtol=0, atol=0)


@pytest.mark.parametrize(("at", "exits"), [((0, 2), 3), ((1,), 2), ((), 1), ((3,), 1)])
def test_exits_are_placed_where_asked(at, exits):
    torch.manual_seed(0)
    network = models.create("resnet18", 10, width=4, at=at).eval()
    assert network.exits == exits
    x = torch.randn(1, 3, 16, 16)
    torch.manual_seed(0)
    trunk = models.ResNet((2, 2, 2, 2), 10, width=4).eval()
    torch.testing.assert_close(network(x)[-1], trunk(x), rtol=0, atol=0)
    early = [place for place in at if place < 3]
    assert [len(stage.exit.branch) for stage in network.stages[:-1]] == [3 - g for g in early]


def test_a_backbone_by_names(x):
    backbone = Backbone().eval()
    network = models.add_exits(backbone, **PARTS, example=x)
    logits, features = network(x, features=True)
    torch.testing.assert_close(logits[-1], backbone(x), rtol=0, atol=0)
    assert [z.shape for z in logits] == [(2, 5)] * 3
    assert [f.shape for f in features] == [(2, 8)] * 3


def test_the_trunk_runs_once(x):
    backbone = Backbone()
    network = models.add_exits(backbone, **PARTS)
    network(x)
    assert [group[0].calls for group in backbone.body.children()] == [1, 1, 1]


def test_training_mode_and_frozen_trunks_are_respected(x):
    backbone = Backbone().requires_grad_(False).train()
    network = models.add_exits(backbone, **PARTS, example=x)
    assert network.training
    assert backbone.norm.training
    assert backbone.norm.num_batches_tracked == 0  # the example was run in evaluation mode
    sum(z.sum() for z in network(x)).backward()
    early = [p for stage in network.stages[:-1] for p in stage.exit.parameters()]
    assert all(p.grad is not None for p in early)
    assert all(p.grad is None for p in backbone.parameters())


def test_copies_have_weights_of_their_own():
    backbone = Backbone()
    parts = {**PARTS, "tail": ["gather", nn.BatchNorm2d(8)]}
    with torch.no_grad():
        parts["tail"][1].weight.fill_(7.0)
    network = models.add_exits(backbone, **parts)
    every = [id(p) for stage in network.stages for p in stage.parameters()]
    assert len(every) == len(set(every))
    last_blocks = [stage.exit.branch[-1] for stage in network.stages[:-1]] + [backbone.body.c[0]]
    classifiers = [stage.exit.classifier for stage in network.stages]
    for copies in ([block.conv for block in last_blocks], classifiers):
        for i, a in enumerate(copies):
            assert not any(torch.equal(a.weight, b.weight) for b in copies[i + 1 :])
    assert [float(stage.exit.tail[1].weight[0].detach()) for stage in network.stages] == [1, 1, 7]
    assert all(block.scale == 0.5 for block in last_blocks)  # has no reset_parameters: kept


def test_blocks_may_be_built_by_a_callable(x):
    def build(group):
        width = group[0].conv.out_channels
        return nn.LazyConv2d(width, 1, stride=2)

    network = models.add_exits(Backbone(), **PARTS, blocks=build, example=x)
    assert [f.shape for f in network(x, features=True)[1]] == [(2, 8)] * 3
    assert isinstance(network.stages[0].exit.branch[0], nn.Conv2d)


def test_without_blocks_classifiers_take_the_size_of_their_group(x):
    network = models.add_exits(Backbone(), **PARTS, blocks=None, example=x)
    logits, features = network(x, features=True)
    assert [f.shape[1] for f in features] == [4, 6, 8]
    assert [z.shape for z in logits] == [(2, 5)] * 3


def test_initialize_is_applied_to_new_modules_only(x):
    def zero(module):
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)

    backbone = Backbone()
    network = models.add_exits(backbone, **PARTS, initialize=zero)
    assert not any(z.any() for z in network(x)[:-1])
    assert backbone.answer.weight.any()


def test_features_may_be_tuples():
    class Split(nn.Module):
        def forward(self, x):
            return x, x + 1

    class Join(nn.Module):
        def forward(self, pair):
            return pair[0] * pair[1]

    head = nn.Linear(3, 2)
    stages = [
        models.Stage(Split(), models.Exit(Join(), nn.Identity(), nn.Linear(3, 2))),
        models.Stage(nn.Identity(), models.Exit(Join(), nn.Identity(), head)),
    ]
    x = torch.randn(4, 3)
    logits = models.MultiExitNetwork(stages)(x)
    torch.testing.assert_close(logits[-1], head(x * (x + 1)))


def test_transformers_resnet():
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 6, 8, 10], depths=[1, 2, 1, 1],
        layer_type="basic", num_labels=7,
    )  # fmt: skip
    model = transformers.ResNetForImageClassification(config).eval()
    x = torch.randn(2, 3, 64, 64)
    network = models.add_exits(
        model,
        stem="resnet.embedder",
        groups=[f"resnet.encoder.stages.{g}" for g in range(4)],
        tail="resnet.pooler",
        head="classifier",
        example=x,
    )
    logits, features = network(x, features=True)
    torch.testing.assert_close(logits[-1], model(x).logits, rtol=0, atol=0)
    assert [f.shape for f in features] == [(2, 10)] * 4
    assert [len(stage.exit.branch) for stage in network.stages[:-1]] == [3, 2, 1]
    network.train()
    sum(z.square().sum() for z in network(x)).backward()
    assert all(p.grad is not None for p in network.parameters())


def wrong(**changes):
    return lambda x: models.add_exits(Backbone(), **{**PARTS, **changes})


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x: models.add_exits(Backbone()), "name the groups .*; got Backbone"),
        (wrong(groups=["body.z"]), "'body.z' is not a module of Backbone"),
        (wrong(groups=[]), "groups must be distinct modules"),
        (wrong(groups=["body.a", "body.a"]), "groups must be distinct modules"),
        (wrong(head=None), "head must name the classifier"),
        (wrong(at=(3,)), r"at must be groups between 0 and 2; got \(3,\)"),
        (wrong(at=(-1,)), "at must be groups between 0 and 2"),
        (wrong(blocks="all"), "blocks must be 'sample', a callable or None; got 'all'"),
        (wrong(blocks=None), "blocks=None needs an example input"),
        (lambda x: wrong(tail=nn.AdaptiveAvgPool2d(1), example=x)(x), "answers; got a difference"),
        (lambda x: wrong(head=nn.Linear(8, 4), example=x)(x), r"got \[2, 4\] for \[2, 5\]"),
        (lambda x: models.MultiExitNetwork([]), "at least one stage"),
    ],
)
def test_errors_name_the_rule(x, call, words):
    with pytest.raises(ValueError, match=words):
        call(x)


def test_an_ambiguous_group_asks_for_a_callable():
    group = nn.Module()
    group.down, group.layers = nn.Conv2d(3, 3, 1), nn.ModuleList([nn.Conv2d(3, 3, 1)])
    parts = {"groups": [nn.Identity(), group], "head": nn.Linear(3, 2)}
    with pytest.raises(ValueError, match="a group must hold one list of blocks"):
        models.add_exits(nn.Module(), **parts)


def test_evaluation_restores_every_mode():
    model = Backbone().train()
    model.norm.eval()
    with evaluation(model):
        assert not any(module.training for module in model.modules())
    with pytest.raises(RuntimeError), evaluation(model):
        model(torch.zeros(1))
    assert model.training
    assert not model.norm.training

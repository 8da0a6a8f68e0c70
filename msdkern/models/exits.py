# SPDX-License-Identifier: Apache-2.0
"""Early exits for any backbone that can name its groups: sampling-based branch augmentation (9).

An early exit sees features that later groups have not widened and shrunk yet. Its branch is made
of ONE block sampled from each later group: built like that group's first block, which changes
width and stride as the trunk does, with weights of its own. Then follow the backbone's own
pooling and a classifier. So a backbone of four groups gets branches of 3, 2 and 1 blocks, and the
vector in front of every classifier has the same shape (Luan et al., 1911.09418).
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from msdkern.models.multi_exit import Exit, MultiExitNetwork, Stage

Part = str | nn.Module  # a dotted name inside the model, or a module to use in its place


class Parts(NamedTuple):
    """A backbone read as stem -> groups -> tail -> head."""

    groups: Sequence[Part]
    stem: Part | Sequence[Part] = ()
    tail: Part | Sequence[Part] = ()
    head: Part | None = None


def add_exits(
    model: nn.Module,
    at: Sequence[int] | None = None,
    blocks: str | Callable[[nn.Module], nn.Module] | None = "sample",
    *,
    groups: Sequence[Part] | None = None,
    stem: Part | Sequence[Part] = (),
    tail: Part | Sequence[Part] = (),
    head: Part | None = None,
    example: Any = None,
    initialize: Callable[[nn.Module], None] | None = None,
) -> MultiExitNetwork:
    """Make a backbone multi-exit; the trunk runs once, branches leave from its features.

    The model is read as ``head(flatten(tail(groups(stem(x)))))``. Its own ResNets say where these
    parts are; for any other module name them, in order::

        add_exits(hf_resnet, stem="resnet.embedder", tail="resnet.pooler", head="classifier",
                  groups=[f"resnet.encoder.stages.{g}" for g in range(4)])
        add_exits(torchvision_resnet, stem=["conv1", "bn1", "relu", "maxpool"],
                  groups=["layer1", "layer2", "layer3", "layer4"], tail="avgpool", head="fc")

    Args:
        model: the backbone. Its modules are used, not copied: the result shares its weights, and
            its deepest exit answers what the model answered.
        at: groups (0-based) behind which an exit is placed; default all. The last group has one
            anyway: the model's own.
        blocks: "sample": from each later group a fresh copy of its first block. A callable
            ``blocks(group) -> module`` builds the block of one later group instead. None: no
            branch at all, the exit pools the features as they are (needs ``example``).
        groups, stem, tail, head: dotted names inside the model, or modules; stem and tail may be
            lists of them, run one after the other. The tail's output is flattened to [N, D]; the
            head is the classifier. Every early exit gets fresh copies of tail and head.
        example: an input of the model. If given, the model is run once without gradient: the
            deepest exit must answer what the model answers, and classifiers are built for the
            feature size that each branch really has.
        initialize: applied to every module of the fresh copies, after their own
            ``reset_parameters``; default He initialisation of convolutions. Parameters of modules
            without ``reset_parameters`` keep the copied values.

    Returns:
        MultiExitNetwork: ``model(x) -> list of K logits``, K = len(at) (and the last group).

    Raises:
        ValueError: for names that are not in the model, for ``at`` out of range, and when the
            named parts do not answer what the model answers.
    """
    parts = Parts(groups, stem, tail, head) if groups is not None else _own_parts(model)
    trunk = [_module(model, name) for name in parts.groups]
    if not trunk or len({id(group) for group in trunk}) != len(trunk):
        raise ValueError(f"add_exits: groups must be distinct modules; got {list(parts.groups)}")
    if parts.head is None:
        raise ValueError("add_exits: head must name the classifier of the model; got None")
    if blocks is None and example is None:
        raise ValueError("add_exits: blocks=None needs an example input; got example=None")
    begin, end = _chain(model, parts.stem), _chain(model, parts.tail)
    classifier = _module(model, parts.head)
    chosen = places("add_exits", at, len(trunk))
    fresh = _Fresh(initialize or he_initialize)

    # Exits are copied before the stages take the modules, so no copy is ever of a used module.
    exits = [
        Exit(_branch(trunk[g + 1 :], blocks, fresh), fresh(end), fresh(classifier))
        for g in chosen[:-1]
    ]
    exits.append(Exit(nn.Identity(), end, classifier))
    stages, start = [], 0
    for g, exit in zip(chosen, exits, strict=True):
        pieces = [begin] * (start == 0) + trunk[start : g + 1]
        stages.append(Stage(nn.Sequential(*pieces), exit))
        start = g + 1
    network = MultiExitNetwork(stages).train(model.training)
    if example is not None:
        _fit(network, model, example, fresh)
    return network


def he_initialize(module: nn.Module) -> None:
    """He initialisation of one module, for `nn.Module.apply`: convolutions by fan-out."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)


# Parts ----------------------------------------------------------------------------------------


def _own_parts(model: nn.Module) -> Parts:
    parts = getattr(model, "parts", None)
    if not isinstance(parts, Parts):
        rule = "add_exits: name the groups (and stem, tail, head) of a model that has no `parts`"
        raise ValueError(f"{rule}; got {type(model).__name__}")
    return parts


def _module(model: nn.Module, part: Part) -> nn.Module:
    if isinstance(part, nn.Module):
        return part
    try:
        return model.get_submodule(part)
    except AttributeError:
        children = [name for name, _ in model.named_children()]
        rule = f"add_exits: {part!r} is not a module of {type(model).__name__}"
        raise ValueError(f"{rule}; got a model with {children}") from None


def _chain(model: nn.Module, part: Part | Sequence[Part]) -> nn.Module:
    names = [part] if isinstance(part, (str, nn.Module)) else list(part)
    modules = [_module(model, name) for name in names]
    return modules[0] if len(modules) == 1 else nn.Sequential(*modules)


def places(op: str, at: Sequence[int] | None, count: int) -> list[int]:
    """Where exits are, in order: ``at`` and the last of ``count`` groups; None: everywhere."""
    chosen = sorted({*range(count)} if at is None else {*at, count - 1})
    if any(not isinstance(g, int) or not 0 <= g < count for g in chosen):
        raise ValueError(f"{op}: at must be groups between 0 and {count - 1}; got {at}")
    return chosen


# Branches -------------------------------------------------------------------------------------


class _Fresh:
    """Copies a module and gives the copy weights of its own."""

    def __init__(self, initialize: Callable[[nn.Module], None]) -> None:
        self.initialize = initialize

    def __call__(self, module: nn.Module) -> nn.Module:
        new = copy.deepcopy(module).requires_grad_(True)
        for child in new.modules():
            reset = getattr(child, "reset_parameters", None)
            if callable(reset):
                reset()
        return new.apply(self.initialize)


def _branch(
    later: Sequence[nn.Module],
    blocks: str | Callable[[nn.Module], nn.Module] | None,
    fresh: _Fresh,
) -> nn.Module:
    if blocks is None:
        return nn.Identity()
    if callable(blocks):
        return nn.Sequential(*(blocks(group) for group in later))
    if blocks != "sample":
        raise ValueError(f"add_exits: blocks must be 'sample', a callable or None; got {blocks!r}")
    return nn.Sequential(*(fresh(first_block(group)) for group in later))


def first_block(group: nn.Module) -> nn.Module:
    """The first block of a group: its first element, or that of the one list it wraps.

    A group without any list inside is a block itself. A group that holds a list among other
    children is ambiguous (what comes before the list may change the shape) and raises.
    """
    if isinstance(group, (nn.Sequential, nn.ModuleList)):
        return group[0]
    children = list(group.children())
    lists = [child for child in children if isinstance(child, (nn.Sequential, nn.ModuleList))]
    if len(children) == 1 and lists:
        return lists[0][0]
    if any(isinstance(child, nn.ModuleList) for child in children):
        rule = "add_exits: a group must hold one list of blocks, or pass blocks=callable"
        raise ValueError(f"{rule}; got {type(group).__name__} with {len(children)} children")
    return group


# Checks against an example --------------------------------------------------------------------


def _fit(network: MultiExitNetwork, model: nn.Module, example: Any, fresh: _Fresh) -> None:
    """Check the deepest exit against the model; give every classifier its true input size."""
    stages: list[Any] = list(network.stages)
    with evaluation(model), evaluation(network), torch.no_grad():
        expected = model(example)
        features = example
        for stage in stages:
            features = stage.trunk(features)
            size = stage.exit.tail(stage.exit.branch(features)).flatten(1).shape[1]
            if stage is not stages[-1]:
                stage.exit.classifier = _sized(stage.exit.classifier, size, fresh)
        answer, _ = stages[-1].exit(features)
    expected = expected if isinstance(expected, Tensor) else expected.logits
    rule = "add_exits: stem, groups, tail and head must answer what the model answers"
    if answer.shape != expected.shape:
        raise ValueError(f"{rule}; got {list(answer.shape)} for {list(expected.shape)}")
    if not torch.allclose(answer, expected, 1e-4, 1e-5):
        raise ValueError(
            f"{rule}; got a difference of {float((answer - expected).abs().max()):.3g}"
        )


def _sized(classifier: nn.Module, size: int, fresh: _Fresh) -> nn.Module:
    """The classifier with the input size of its first linear layer set, fresh if that changed."""
    linear = next((m for m in classifier.modules() if isinstance(m, nn.Linear)), None)
    if linear is None or linear.in_features == size:
        return classifier
    shape = (linear.out_features, size)
    linear.weight = nn.Parameter(linear.weight.new_empty(shape))
    linear.in_features = size
    return fresh(classifier)


@contextlib.contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every module is back in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode

# SPDX-License-Identifier: Apache-2.0
"""torchdistill: the configuration of the docstring trains as the plain loop does."""

import textwrap

import pytest
import torch
import yaml
from torch.utils.data import SequentialSampler

pytest.importorskip("torchdistill")
pytest.importorskip("torchdistill.core.training")


@pytest.fixture
def configuration():
    from msdkern.integrations import torchdistill

    text = torchdistill.__doc__.split("::\n")[1].split("Import this")[0]
    config = yaml.safe_load(textwrap.dedent(text))
    loader = {
        "dataset_id": "digits",
        "sampler": {"class_or_func": SequentialSampler},
        "kwargs": {"batch_size": 32},
    }
    optimizer = {"key": "SGD", "kwargs": {"lr": 0.05, "momentum": 0.9}}
    return {**config, "num_epochs": 1, "train_data_loader": loader, "optimizer": optimizer}


def train(problem, config):
    from torchdistill.core.training import get_training_box

    network = problem.network()
    box = get_training_box(
        network, {"digits": problem.dataset}, config, torch.device("cpu"), None, False, 1
    )
    losses = []
    box.pre_epoch_process(epoch=0)
    for images, labels, supplement in box.train_data_loader:
        loss = box.forward_process(images, labels, supplement)
        losses.append(loss.item())
        box.post_forward_process(loss)
    return losses, network.state_dict()


@pytest.mark.parametrize("features", [False, True])
def test_step_by_step(problem, configuration, plain, same, features):
    paths = [f"stages.{k}.exit.classifier" for k in range(3)]
    hooks = configuration["model"]["forward_hook"]
    kwargs = configuration["criterion"]["kwargs"]["sub_terms"]["exits"]["criterion"]["kwargs"]
    assert kwargs["exits"] == hooks["output"] == paths[:2]
    hooks["output"], kwargs["exits"] = paths, paths
    kwargs.update(alpha=0.3, temperature=2.0, beta_begin=0.01 * features, beta_end=0.01 * features)
    if features:
        hooks["input"] = paths
    options = {"beta_begin": 0.01 * features, "beta_end": 0.01 * features}
    same(train(problem, configuration), plain(problem, problem.criterion(**options)))


def test_teachers_of_another_network():
    from torchdistill.losses.registry import get_mid_level_loss

    import msdkern

    kwargs = {"exits": ["a", "b"], "loss": "kd", "teachers": ["t"], "temperature": 3.0}
    loss = get_mid_level_loss({"key": "MultiExitLoss", "kwargs": kwargs})
    a, b, teacher = torch.randn(3, 6, 5)
    labels = torch.arange(6) % 5
    student = {"a": {"output": a}, "b": {"output": b}}
    expected = msdkern.nn.create("kd", exits=2, temperature=3.0)([a, b], labels, None, teacher)
    torch.testing.assert_close(loss(student, {"t": {"output": teacher}}, labels), expected)

# SPDX-License-Identifier: Apache-2.0
"""timm's task: the plain loop's losses, the deepest exit's accuracy, checkpoints and averages."""

import pytest
import torch

pytest.importorskip("timm.task")


@pytest.fixture
def task(problem):
    from msdkern.integrations.timm import MultiExitTask

    return MultiExitTask(problem.network(), problem.criterion(), verbose=False)


def test_step_by_step(problem, task, plain, same):
    optimizer = problem.optimizer(task.get_trainable_module().parameters())
    losses = []
    for images, labels in problem.batches():
        result = task(images, labels)
        optimizer.zero_grad()
        result["loss"].backward()
        optimizer.step()
        losses.append(result["loss"].item())
    same((losses, task.get_trainable_module().state_dict()), plain(problem))
    assert result["output"].shape == (32, 10)
    assert all(result[f"cross_entropy_{k}"] > 0 for k in (1, 2, 3))


def test_evaluator_judges_the_deepest_exit(problem, task):
    evaluator, model = task.create_evaluator(), task.get_eval_model().eval()
    with torch.no_grad():
        for images, labels in problem.batches():
            evaluator.update(model(images), labels)
        deepest = model(problem.images)[-1]
    right = (deepest.argmax(1) == problem.labels).double().mean()
    assert evaluator.compute()["top1"] == pytest.approx(100 * float(right))


def test_checkpoint_and_average_hold_the_network(problem, task):
    task.setup_ema(decay=0.5)
    with torch.no_grad():
        task.trainable_module.stages[0].exit.classifier.bias += 1.0
    task.update_ema()
    state = task.get_checkpoint_state()["state_dict"]
    assert state.keys() == problem.network().state_dict().keys()
    bias = "stages.0.exit.classifier.bias"
    torch.testing.assert_close(
        task.get_checkpoint_state(ema=True)["state_dict_ema"][bias], state[bias] - 0.5
    )

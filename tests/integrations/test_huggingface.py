# SPDX-License-Identifier: Apache-2.0
"""Hugging Face's Trainer, its gradient accumulation with ignored rows included."""

import pytest
import torch

pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")


@pytest.fixture
def trainer_for(problem, tmp_path):
    from msdkern.integrations import huggingface

    def make(criterion, rows, accumulate=1, network=None):
        args = transformers.TrainingArguments(
            str(tmp_path), use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
            per_device_train_batch_size=rows, gradient_accumulation_steps=accumulate,
            per_device_eval_batch_size=rows, num_train_epochs=1, max_grad_norm=0.0,
            logging_steps=1, logging_nan_inf_filter=False, lr_scheduler_type="constant",
        )  # fmt: skip
        network = network or problem.network()
        model = huggingface.MultiExitModel(network, features=criterion.needs_features)
        optimizer = problem.optimizer(network.parameters())
        return problem.trainer(
            model, args, eval_dataset=problem.dataset, optimizers=(optimizer, None),
            compute_loss_func=huggingface.compute_loss_func(criterion),
        )  # fmt: skip

    return make


def losses_of(trainer):
    return [record["loss"] for record in trainer.state.log_history if "loss" in record]


@pytest.mark.parametrize("beta", [0.0, 0.01])
def test_step_by_step(problem, plain, same, trainer_for, beta):
    options = {"beta_begin": beta, "beta_end": beta}
    trainer = trainer_for(problem.criterion(**options), rows=32)
    trainer.train()
    got = losses_of(trainer), trainer.model.network.state_dict()
    same(got, plain(problem, problem.criterion(**options)))


def test_accumulated_batches_divide_by_the_rows_of_the_step(problem, trainer_for, plain, same):
    """The first batch of each pair has 3 valid rows, the second 16."""
    problem.labels.view(-1, 32)[:, 3:16] = -100

    def frozen():  # batch normalisation sees single batches
        network = problem.network().eval()
        network.train = lambda mode=True: network
        return network

    network = frozen()
    trainer = trainer_for(problem.criterion(), 16, accumulate=2, network=network)
    trainer.train()
    same((losses_of(trainer), network.state_dict()), plain(problem, network=frozen()))


def test_evaluation_reads_the_deepest_exit(problem, trainer_for):
    trainer = trainer_for(problem.criterion(), rows=32)
    output = trainer.predict(problem.dataset)
    with torch.no_grad():
        expected = problem.network().eval()(problem.images)
    torch.testing.assert_close(torch.from_numpy(output.predictions[0]), expected[-1])
    assert len(output.predictions[1]) == len(expected)
    loss = problem.criterion()(expected, problem.labels).item()
    assert output.metrics["test_loss"] == pytest.approx(loss, rel=1e-5)


def test_count_of_all_processes():
    """Two processes, a global count, the loss multiplied by two: DDP's mean is then the whole."""
    from msdkern.integrations.huggingface import MultiExitOutput, compute_loss_func
    from msdkern.nn import MSDLoss

    logits = torch.randn(3, 8, 5, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 3, 4, -100, -100, -100])
    loss = compute_loss_func(MSDLoss())

    def part(rows, count):
        exits = tuple(logits[:, rows])
        return loss(MultiExitOutput(exits[-1], exits), labels[rows], num_items_in_batch=count)

    halves = [part(slice(0, 4), torch.tensor(5)), part(slice(4, 8), torch.tensor(5))]
    whole = part(slice(0, 8), None)
    torch.testing.assert_close(sum(2 * half for half in halves) / 2, whole)


def test_other_outputs_are_named():
    from msdkern.integrations.huggingface import compute_loss_func
    from msdkern.nn import MSDLoss

    with pytest.raises(ValueError, match="output must hold exit_logits; got logits, past"):
        compute_loss_func(MSDLoss())({"logits": None, "past": None}, None)

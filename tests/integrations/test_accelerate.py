# SPDX-License-Identifier: Apache-2.0
"""Accelerate needs nothing from msdkern, under gradient accumulation neither."""

import pytest
import torch
from torch.utils.data import DataLoader

accelerate = pytest.importorskip("accelerate")


def test_prepare_leaves_the_loss_alone(problem, plain, same):
    accelerator = accelerate.Accelerator(cpu=True)
    network, criterion = problem.network(), problem.criterion()
    model, optimizer, loader = accelerator.prepare(
        network, problem.optimizer(network.parameters()), DataLoader(problem.dataset, 32)
    )
    losses = []
    for images, labels in loader:
        loss = criterion(model(images), labels)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    same((losses, accelerator.unwrap_model(model).state_dict()), plain(problem))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_rows_of_all_batches_of_a_step_divide(problem, accumulate):
    """Two batches of unequal valid rows give the gradient of their union.

    The network's batch normalisation is frozen, for it sees single batches.
    """
    network, criterion = problem.network().eval(), problem.criterion()
    labels = problem.labels[:64].clone()
    labels[:27] = -100
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    model = accelerator.prepare(network)
    valid = (labels >= 0).sum()
    parts = zip(problem.images[:64].chunk(accumulate), labels.chunk(accumulate), strict=True)
    for images, part in parts:
        with accelerator.accumulate(model):
            # `backward` divides by the number of batches; the count has done so already.
            loss = criterion(model(images), part, normalizer=valid) * accumulate
            accelerator.backward(loss)
    whole = problem.network().eval()
    criterion(whole(problem.images[:64]), labels).backward()
    for got, expected in zip(network.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, rtol=1e-4, atol=1e-6)

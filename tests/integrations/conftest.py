# SPDX-License-Identifier: Apache-2.0
"""A short training on digits, and the plain loop that every trainer must repeat."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import msdkern
from msdkern import models
from msdkern.train.data import digits

STEPS, ROWS, RATE = 8, 32, 0.05


@dataclass
class Problem:
    """Eight batches of digits in order, and a network with fresh weights for every trainer."""

    images: Tensor
    labels: Tensor

    def network(self) -> nn.Module:
        torch.manual_seed(0)
        return models.create("resnet8", 10, 1, width=4)

    def criterion(self, **options) -> nn.Module:
        return msdkern.nn.MSDLoss(alpha=0.3, temperature=2.0, **options)

    def optimizer(self, parameters) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=RATE, momentum=0.9)

    @property
    def dataset(self) -> TensorDataset:
        return TensorDataset(self.images, self.labels)

    def batches(self, rows: int = ROWS):
        return zip(self.images.split(rows), self.labels.split(rows), strict=True)

    def trainer(self, model, args, **options):
        """Hugging Face's, which takes the rows as they come."""
        import transformers

        class InOrder(transformers.Trainer):
            def _get_train_sampler(self, *_):
                return torch.utils.data.SequentialSampler(self.train_dataset)

        def collate(rows):
            images, labels = zip(*rows, strict=True)
            return {"pixel_values": torch.stack(images), "labels": torch.stack(labels)}

        return InOrder(model, args, data_collator=collate, train_dataset=self.dataset, **options)


def make_problem() -> Problem:
    rows = digits()
    count = STEPS * ROWS
    images = (rows.images[:count].permute(0, 3, 1, 2).float() - 4.9) / 6.0
    return Problem(images, rows.labels[:count].clone())


@pytest.fixture
def problem():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield make_problem()
    torch.set_num_threads(before)


def plain_loop(problem, criterion=None, schedule=False, network=None):
    """Losses of all steps, and the weights they lead to, in nothing but PyTorch."""
    network, criterion = network or problem.network(), criterion or problem.criterion()
    optimizer = problem.optimizer(network.parameters())
    losses = []
    for step, (images, labels) in enumerate(problem.batches()):
        if schedule:
            criterion.set_progress(step / STEPS)
        logits, features = network(images, features=True)
        loss = criterion(logits, labels, features if criterion.needs_features else None)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, network.state_dict()


@pytest.fixture
def plain():
    return plain_loop


@pytest.fixture
def same():
    """Losses and weights agree to rounding; the loss has fallen, so that there was training."""

    def check(got, expected):
        (losses, weights), (truth, final) = got, expected
        assert len(losses) == len(truth)
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(truth), rtol=1e-5, atol=1e-6)
        assert truth[-1] < truth[0]
        assert weights.keys() == final.keys()
        for name in final:
            torch.testing.assert_close(weights[name], final[name], rtol=1e-4, atol=1e-5)

    return check

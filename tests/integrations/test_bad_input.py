# SPDX-License-Identifier: Apache-2.0
"""What a trainer may hand to the loss by mistake: one sentence each, whatever the loss."""

import pytest
import torch
from torch import nn

import msdkern
from msdkern.integrations import answers

IMAGES, LABELS = torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)


class Answering(nn.Module):
    """A model that returns what it was made with."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, images, features=False):
        return self.answer


def exits(count):
    return [torch.zeros(4, 5, requires_grad=True) for _ in range(count)]


CASES = {
    "dict": ({}, {"logits": 0, "loss": 0}, LABELS, TypeError, "got a mapping with logits, loss"),
    "dict, with features": (
        {"beta_begin": 0.1}, {"logits": 0}, LABELS, TypeError, "got a mapping with logits",
    ),
    "exits, by weights": (
        {"exit_weight": [1.0, 1.0, 2.0]}, exits(2), LABELS, ValueError, "exit_weight must be",
    ),
    "exits, by pairs": (
        {"pair_weight": torch.zeros(3, 3)}, exits(2), LABELS, ValueError, "pair_weight must be",
    ),
    "no exits": ({}, [], LABELS, ValueError, "logits must be"),
    "nothing": ({}, None, LABELS, ValueError, "logits must be"),
    "one tensor of one exit": ({}, torch.zeros(4, 5), LABELS, ValueError, "logits must be"),
    "features missing": (
        {"beta_begin": 0.1}, exits(2), LABELS, ValueError, "features are needed",
    ),
    "labels elsewhere": (
        {}, exits(2), LABELS.to("meta"), ValueError,
        "target must be on the device of the logits (cpu); got 'meta'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_one_sentence(case):
    options, answer, labels, error, words = CASES[case]
    criterion = msdkern.nn.MSDLoss(**options)
    logits, features = answers(Answering(answer), criterion, IMAGES)
    with pytest.raises(error) as caught:
        criterion(logits, labels, features)
    sentence = str(caught.value)
    assert words in sentence
    assert sentence.split(":")[0] in ("MSDLoss", "multi_exit_loss")
    assert "\n" not in sentence

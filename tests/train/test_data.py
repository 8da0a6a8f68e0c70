# SPDX-License-Identifier: Apache-2.0
"""Where the images come from, and who is held out."""

import numpy as np
import pytest
import torch

from msdkern.cli import CommandError
from msdkern.train import data
from msdkern.train.config import TrainConfig


def keys(rows):
    return {
        (row.numpy().tobytes(), int(label))
        for row, label in zip(rows.images, rows.labels, strict=True)
    }


def test_digits_are_split_once_and_by_class():
    dataset = data.load(TrainConfig())
    assert len(dataset.train) + len(dataset.held_out) == 1797
    assert dataset.input_shape == (1, 8, 8)
    assert not keys(dataset.train) & keys(dataset.held_out)
    share = dataset.held_out.labels.bincount() / (
        dataset.train.labels.bincount() + dataset.held_out.labels.bincount()
    )
    assert torch.all((share - 0.2).abs() < 0.004)


def test_split_follows_its_own_seed():
    first = data.load(TrainConfig(seed=1))
    assert data.load(TrainConfig(seed=2)).fingerprint == first.fingerprint
    other = data.load(TrainConfig(split_seed=1))
    assert other.fingerprint != first.fingerprint
    assert keys(other.held_out) != keys(first.held_out)


def test_validation_rows_leave_the_training_rows_only():
    whole = data.load(TrainConfig())
    assert whole.validation is None
    found = data.load(TrainConfig(validation=123))
    assert (len(found.validation), len(found.train)) == (123, len(whole.train) - 123)
    assert torch.equal(found.held_out.images, whole.held_out.images)
    assert keys(found.validation) | keys(found.train) == keys(whole.train)
    assert not keys(found.validation) & (keys(found.train) | keys(found.held_out))
    mean, std = data.channel_moments(found.train.images)
    assert (found.mean, found.std) == (mean, std)
    marks = {
        data.load(TrainConfig(validation=count, split_seed=seed)).fingerprint
        for count, seed in ((0, 0), (123, 0), (124, 0), (0, 1), (123, 1))
    }
    assert len(marks) == 5
    assert data.load(TrainConfig(validation=123, seed=7)).fingerprint == found.fingerprint


def test_validation_must_leave_rows_to_train_on():
    rows = len(data.load(TrainConfig()).train)
    sentence = f"--validation: must leave some of the {rows} training rows; got {rows}"
    with pytest.raises(CommandError, match=sentence):
        data.load(TrainConfig(validation=rows))
    with pytest.raises(CommandError, match="--validation: must be at least 0; got -1"):
        TrainConfig(validation=-1)


def test_moments_are_those_of_all_training_pixels():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (5000, 3, 4, 2), generator=generator, dtype=torch.uint8)
    mean, std = data.channel_moments(images)
    pixels = images.double().flatten(0, 2)
    torch.testing.assert_close(mean, pixels.mean(0).float())
    torch.testing.assert_close(std, pixels.std(0, correction=0).float())


def test_constant_images_do_not_divide_by_zero():
    _, std = data.channel_moments(torch.full((4, 2, 2, 1), 7, dtype=torch.uint8))
    assert torch.isfinite(1 / std).all()


def test_synthetic_bound_is_what_the_best_classifier_reaches():
    rows, best = data.synthetic(count=40000)
    flat = rows.images.flatten(1)
    # The mean of a class is the signal times its pattern: 4,000 rows pin the pattern down.
    patterns = torch.stack([flat[rows.labels == c].mean(0) for c in range(10)])
    accuracy = ((flat @ patterns.T).argmax(1) == rows.labels).double().mean()
    assert abs(float(accuracy) - best) < 0.008


def test_fingerprint_sees_every_pixel_and_label(tree):
    dataset = data.load(TrainConfig(data="cifar10", root=str(tree)))
    parts = {"train": dataset.train, "held_out": dataset.held_out}

    def mark(**changes):
        chosen = {**parts, **changes}
        return data.describe(
            chosen["train"], chosen["held_out"], dataset.classes, shift=0, mirror=False
        ).fingerprint

    images = dataset.train.images.clone()
    images[3, 2, 1, 0] ^= 1
    labels = dataset.held_out.labels.clone()
    labels[-1] = 0
    marks = {
        mark(),
        mark(train=data.Rows(images, dataset.train.labels)),
        mark(held_out=data.Rows(dataset.held_out.images, labels)),
    }
    assert len(marks) == 3
    assert mark() == dataset.fingerprint


def test_images_stay_as_they_are(tree):
    from PIL import Image

    dataset = data.load(TrainConfig(data="cifar10", root=str(tree)))
    with Image.open(tree / "test" / "bee" / "0003.png") as file:
        expected = np.asarray(file)
    assert np.array_equal(dataset.held_out.images[8 + 3].numpy(), expected)
    assert dataset.held_out.labels[8 + 3] == 1

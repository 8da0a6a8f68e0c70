# SPDX-License-Identifier: Apache-2.0
"""Order and augmentation: right by pixel, and the same from any starting point."""

import pytest
import torch

from msdkern.cli import CommandError
from msdkern.train import data
from msdkern.train.batches import TrainBatches, generator_for, in_order

CPU = torch.device("cpu")


def batches_of(config, **changes):
    c = config(**changes)
    return TrainBatches(c, data.load(c), CPU)


def pixels_of(batches, images):
    """The uint8 pixels [B, H, W, C] behind normalised images."""
    normalise = batches.normalise
    return (images.permute(0, 2, 3, 1) * normalise.std + normalise.mean).round().to(torch.uint8)


def crop(image, down, across, mirrored, margin):
    """One image, shifted over black and mirrored, written as a loop over pixels."""
    height, width, _ = image.shape
    out = torch.zeros_like(image)
    for y in range(height):
        for x in range(width):
            column = width - 1 - x if mirrored else x
            source_y, source_x = y + down - margin, column + across - margin
            if 0 <= source_y < height and 0 <= source_x < width:
                out[y, x] = image[source_y, source_x]
    return out


def test_augmentation_is_a_crop_of_the_padded_image(config):
    batches = batches_of(config)
    rows = data.load(config()).train
    generator = torch.Generator().manual_seed(3)
    chosen = torch.tensor([5, 0, 95, 31])
    offset = torch.randint(9, (2, 4), generator=generator)
    mirrored = torch.tensor([True, False, False, True])
    images, labels = batches._batch(chosen, offset, mirrored)
    got = pixels_of(batches, images)
    for k, row in enumerate(chosen):
        expected = crop(rows.images[row], int(offset[0, k]), int(offset[1, k]), mirrored[k], 4)
        assert torch.equal(got[k], expected)
    assert torch.equal(labels, rows.labels[chosen])


def test_every_row_once_per_epoch(config):
    batches = batches_of(config, augment="none")
    seen = [pixels_of(batches, images) for images, _ in batches.epoch(0)]
    rows = data.load(config()).train
    assert {r.numpy().tobytes() for r in torch.cat(seen)} == {
        r.numpy().tobytes() for r in rows.images
    }


def test_any_batch_can_be_the_first(config):
    batches = batches_of(config)
    whole = list(batches.epoch(3))
    assert len(whole) == 6
    for (left, label), (right, other) in zip(whole[4:], batches.epoch(3, start=4), strict=True):
        assert torch.equal(left, right)
        assert torch.equal(label, other)


def test_epochs_and_seeds_differ(config):
    orders = [
        torch.cat([labels for _, labels in batches_of(config, seed=seed).epoch(epoch)]).tolist()
        for seed, epoch in ((0, 0), (0, 1), (1, 0))
    ]
    assert orders[0] != orders[1]
    assert orders[0] != orders[2]
    assert orders[1] != orders[2]


def test_mirrors_only_where_a_mirrored_image_keeps_its_label(config):
    assert not batches_of(config, data="digits", root="").mirror
    assert not batches_of(config, augment="crop").mirror
    assert batches_of(config).mirror
    assert batches_of(config, augment="none").shift == 0


def test_generators_do_not_repeat():
    draws = {
        int(torch.randint(2**62, (1,), generator=generator_for(seed, epoch)))
        for seed in range(20)
        for epoch in range(20)
    }
    assert len(draws) == 400


@pytest.mark.parametrize("channels_last", [True, False])
def test_normalised_and_laid_out(config, channels_last):
    c = config(augment="none", channels_last=channels_last, batch_size=96)
    batches = TrainBatches(c, data.load(c), CPU)
    ((images, _),) = batches.epoch(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert images.is_contiguous(memory_format=layout)
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        images.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-5, rtol=0
    )


def test_held_out_rows_come_in_order(config):
    dataset = data.load(config())
    batches = batches_of(config)
    read = list(in_order(dataset.held_out, batches.normalise, 5, CPU))
    assert [len(labels) for _, labels in read] == [5] * 6 + [2]
    got = torch.cat([pixels_of(batches, images) for images, _ in read])
    assert torch.equal(got, dataset.held_out.images)


def test_batch_larger_than_the_data(config):
    with pytest.raises(CommandError, match=r"--batch-size: 64 x --accumulate 2 .* the 96 training"):
        batches_of(config, batch_size=64, accumulate=2)

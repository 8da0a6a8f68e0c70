# SPDX-License-Identifier: Apache-2.0
"""No row that calibrates reports, and none was trained on."""

from dataclasses import replace

import pytest
import torch

from msdkern.calibrate.sets import sets_of
from msdkern.cli import CommandError
from msdkern.train import data
from msdkern.train.config import TrainConfig


def keys(*sets):
    return {tuple(image.flatten().tolist()) for rows in sets for image in rows.images}


@pytest.fixture
def dataset():
    yield lambda validation: data.load(TrainConfig(data="synthetic", validation=validation))
    data._load.cache_clear()


@pytest.mark.parametrize("apart", [False, True])
def test_rows_set_aside_calibrate_and_the_held_out_report(dataset, apart):
    known = dataset(301)
    found = sets_of(known, apart)
    assert found.source == "validation"
    assert found.report is known.held_out
    calibrating = keys(found.temperature, found.thresholds)
    assert calibrating == keys(known.validation)
    assert len(calibrating) == 301
    assert not calibrating & keys(known.train, known.held_out)
    shared = keys(found.temperature) & keys(found.thresholds)
    assert len(shared) == (0 if apart else 301)


def test_without_them_the_held_out_are_cut_in_three(dataset):
    known = dataset(0)
    found = sets_of(known)
    again = sets_of(known, apart=True)
    assert found.source == "held-out"
    parts = [keys(rows) for rows in found[:3]]
    assert [len(part) for part in parts] == [200, 200, 200]
    assert set.union(*parts) == keys(known.held_out)
    assert all(torch.equal(a.labels, b.labels) for a, b in zip(found[:3], again[:3], strict=True))


def test_too_few_rows(dataset):
    known = dataset(2)
    few = data.Rows(known.held_out.images[:2], known.held_out.labels[:2])
    with pytest.raises(CommandError, match="needs at least 3 held-out rows; got 2"):
        sets_of(replace(known, validation=None, held_out=few))
    one = data.Rows(few.images[:1], few.labels[:1])
    with pytest.raises(CommandError, match="needs at least 2 validation rows; got 1"):
        sets_of(replace(known, validation=one), apart=True)

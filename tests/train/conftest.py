# SPDX-License-Identifier: Apache-2.0
"""A tiny tree of images and configs that train on it in a second."""

import os

import numpy as np
import pytest
from PIL import Image

from msdkern.train import data
from msdkern.train.config import TrainConfig

CLASSES = ("ant", "bee", "cow", "dog")


def draw_tree(root, train=24, test=8, size=8):
    """``train/<class>/*.png`` and ``test/...``: every class has a colour of its own, plus noise."""
    rng = np.random.default_rng(0)
    for part, count in (("train", train), ("test", test)):
        for label, name in enumerate(CLASSES):
            folder = root / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 120, (size, size, 3))
                pixels[..., label % 3] += 30 * (label + 1)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number:04d}.png")
    return root


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    return draw_tree(tmp_path_factory.mktemp("images"))


@pytest.fixture
def config(tree, tmp_path):
    """``config(**changes)``: a run on the tree, in a folder of its own."""

    def make(**changes):
        settings = {
            "data": "cifar10",
            "root": str(tree),
            "out": str(tmp_path / "run"),
            "epochs": 2,
            "batch_size": 16,
            "lr": 0.02,
            "threads": 1,
            "log_every": 2,
            "quiet": True,
        }
        return TrainConfig(**{**settings, **changes})

    return make


@pytest.fixture(autouse=True)
def leave_no_trace():
    """The data in memory do not leak into other tests."""
    yield
    data._load.cache_clear()


@pytest.fixture
def environment():
    """For processes that a test starts: this source tree, one thread."""
    from pathlib import Path

    root = str(Path(__file__).resolve().parents[2])
    return {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}

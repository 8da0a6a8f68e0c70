# SPDX-License-Identifier: Apache-2.0
"""Multiply-adds and parameters of every MSDNet and RANet that has a name.

Three sources must agree at every exit: the model, sums by hand (tally.py) from numbers written
out here, and what the authors' own counters print, in millions.
"""

from itertools import accumulate

import pytest
import torch

from msdkern import models
from msdkern.models import msdnet, ranet
from tests.models import tally

SMALL_STEM = {"size": 32, "big": False}
CIFAR = {**SMALL_STEM, "width": 16, "growth": 6, "exit_channels": 128}
IMAGENET = {"size": 224, "big": True, "exit_channels": None, "growth": 16, "classes": 1000}
THREE = {"factors": (1, 2, 4), "inner": (1, 2, 4)}
FOUR = {"factors": (1, 2, 4, 4), "inner": (1, 2, 4, 4)}
BY_HAND = {
    "msdnet": {"steps": [4, 2, 2, 2, 2, 2, 2], "classes": 100, **CIFAR, **THREE},
    "msdnet_anytime10": {"steps": [4] + [2] * 9, "classes": 100, **CIFAR, **THREE},
    "msdnet_anytime11": {"steps": [4] + [2] * 10, "classes": 100, **CIFAR, **THREE},
    "msdnet_budgeted": {"steps": [1, 2, 3, 4, 5], "classes": 100, **CIFAR, **THREE},
    "msdnet_budgeted7": {"steps": [1, 2, 3, 4, 5, 6, 7], "classes": 100, **CIFAR, **THREE},
    "msdnet_imagenet4": {"steps": [4] * 5, "width": 32, **IMAGENET, **FOUR},
    "msdnet_imagenet6": {"steps": [6] * 5, "width": 32, **IMAGENET, **FOUR},
    "msdnet_imagenet7": {"steps": [7] * 5, "width": 32, **IMAGENET, **FOUR},
    "msdnet_small": {
        "steps": [1, 2, 3, 4, 5],
        "classes": 10,
        "width": 8,
        "growth": 4,
        "exit_channels": 64,
        **SMALL_STEM,
        **THREE,
    },
    "msdnet_tiny": {
        "steps": [2, 2, 2],
        "classes": 10,
        "width": 8,
        "growth": 4,
        "exit_channels": 32,
        **SMALL_STEM,
        **THREE,
    },
    "ranet": {
        "layers": [4] * 8,
        "scales": (1, 2, 3, 3),
        "factors": (4, 2, 1, 1),
        "inner": (4, 2, 1, 1),
        "classes": 10,
        **CIFAR,
    },
    "ranet_lg": {
        "layers": [2, 4, 6, 8, 10, 12],
        "scales": (1, 2, 3),
        "factors": (4, 2, 1),
        "inner": (4, 2, 1),
        "classes": 10,
        **CIFAR,
    },
    "ranet_imagenet": {
        "layers": [8] * 8,
        "scales": (1, 2, 3, 4),
        "factors": (4, 2, 1, 1),
        "inner": (4, 2, 1, 1),
        "width": 16,
        **IMAGENET,
    },
    "ranet_imagenet_wide": {
        "layers": [8] * 8,
        "scales": (1, 2, 3, 4),
        "factors": (4, 2, 2, 1),
        "inner": (4, 2, 2, 1),
        "width": 32,
        **IMAGENET,
    },
    "ranet_tiny": {
        "layers": [2] * 4,
        "scales": (1, 2),
        "factors": (2, 1),
        "inner": (2, 1),
        "classes": 10,
        "width": 8,
        "growth": 4,
        "exit_channels": 32,
        **SMALL_STEM,
    },
}

# FLOPs and parameters in millions, as printed by op_counter.py of kalviny/MSDNet-PyTorch
# (f654595; msdnet_imagenet7 also in its issue 10) and of yangle15/RANet-pytorch (be0f25a). The
# Lua code has no such counter; its configurations went through the PyTorch one.
PRINTED = {
    "msdnet": (
        "15.14 25.51 37.10 46.33 57.34 66.96 75.94",
        "0.43 0.88 1.27 1.70 2.18 2.60 3.07",
    ),
    "msdnet_anytime10": (
        "15.14 25.51 37.79 52.06 62.18 74.07 87.73 100.04 110.12 121.68",
        "0.43 0.88 1.38 1.83 2.28 2.79 3.37 3.86 4.38 4.96",
    ),
    "msdnet_anytime11": (
        "15.14 25.51 37.79 52.06 62.18 74.07 87.73 100.04 110.12 121.68 134.71",
        "0.43 0.88 1.38 1.83 2.28 2.79 3.37 3.86 4.38 4.96 5.60",
    ),
    "msdnet_budgeted": ("6.86 14.35 27.54 41.71 58.48", "0.30 0.65 1.02 1.49 2.08"),
    "msdnet_budgeted7": (
        "6.86 14.35 27.29 48.45 76.43 108.85 137.28",
        "0.30 0.65 1.11 1.73 2.38 3.05 3.97",
    ),
    "msdnet_imagenet4": ("339.90 685.46 1008.16 1254.47 1360.53", "4.24 8.77 13.07 16.75 23.96"),
    "msdnet_imagenet6": (
        "514.66 1171.18 1844.52 2501.40 2742.06",
        "7.08 15.69 24.01 42.19 56.53",
    ),
    "msdnet_imagenet7": (
        "615.69 1436.39 2283.21 2967.42 3253.79",
        "8.76 20.15 31.73 41.86 62.31",
    ),
    "ranet": (
        "15.81 31.28 44.66 50.36 60.65 63.65 90.17 94.90",
        "0.47 1.07 1.48 1.87 2.17 2.45 2.87 3.26",
    ),
    "ranet_lg": ("8.36 21.77 32.84 41.52 53.23 58.92", "0.35 0.88 1.27 1.75 2.13 2.55"),
    "ranet_imagenet": (
        "168.07 520.47 731.89 903.79 1052.25 1118.80 1589.01 1680.98",
        "8.09 33.31 42.98 58.90 64.00 70.85 78.53 87.97",
    ),
    "ranet_imagenet_wide": (
        "246.47 631.16 860.40 1041.14 1869.85 2160.38 2734.28 2828.31",
        "9.92 37.92 48.35 65.12 85.60 113.06 121.47 131.12",
    ),
}


def by_hand(name):
    return (tally.msdnet if name in msdnet.TABLE else tally.ranet)(**BY_HAND[name])


def test_every_name_is_counted():
    assert BY_HAND.keys() == msdnet.TABLE.keys() | ranet.TABLE.keys()
    assert BY_HAND.keys() - PRINTED.keys() == {"msdnet_small", "msdnet_tiny", "ranet_tiny"}


@pytest.mark.parametrize("name", BY_HAND)
def test_the_model_costs_what_the_formulas_say(name):
    with torch.device("meta"):
        network = models.create(name, BY_HAND[name]["classes"])
    size = BY_HAND[name]["size"]
    parameters = [sum(p.numel() for p in stage.parameters()) for stage in network.stages]
    costs = models.multiply_adds(network, (3, size, size))
    expected = by_hand(name)
    assert costs == [madds for madds, _, _ in expected]
    assert list(accumulate(parameters)) == [count for _, count, _ in expected]


@pytest.mark.parametrize("name", PRINTED)
def test_the_formulas_say_what_the_authors_count(name):
    """To the last digit printed: it is the same network."""
    flops, parameters = ([float(text) for text in line.split()] for line in PRINTED[name])
    lines = by_hand(name)
    assert [operations / 1e6 for _, _, operations in lines] == pytest.approx(flops, abs=0.00501)
    assert [count / 1e6 for _, count, _ in lines] == pytest.approx(parameters, abs=0.00501)

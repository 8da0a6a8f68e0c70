# SPDX-License-Identifier: Apache-2.0
"""torchvision beside a PyTorch that cannot load its binary part, as on computers without a GPU.

transformers, timm and torchdistill import torchvision, and that asks for two operators of its
binary part at import. None of them is called here.

And the order of the tests where several processes share them.
"""

import importlib.util
from pathlib import Path

import pytest
import torch

from tests import sharing

OPERATORS = []  # a library lives as long as the object


def declare_operators(location: Path) -> None:
    try:
        torch.ops.load_library(location / "_C.so")
    except OSError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        OPERATORS.append(library)


if found := importlib.util.find_spec("torchvision"):
    declare_operators(Path(found.submodule_search_locations[0]))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    return sharing.scheduler(config, log) if config.getvalue("dist") == "loadscope" else None


def pytest_collection_modifyitems(config, items):
    if hasattr(config, "workerinput"):  # this is one of several processes
        items.sort(key=lambda item: sharing.place_of(item.nodeid))

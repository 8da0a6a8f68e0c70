# SPDX-License-Identifier: Apache-2.0
"""MSDKERN_TEST_DEVICE=cuda runs these tests on a GPU: tensors that name no device are made there.

Tests marked `host` say what happens on a CPU (its sentences, values that are read) and stay there.
"""

from __future__ import annotations

import pytest
import torch

from tests.servers import DEVICE


@pytest.fixture(autouse=True)
def _device(request):
    if DEVICE == "cpu":  # nothing is entered: plain calls skip the dispatcher only unobserved
        yield
        return
    if request.node.get_closest_marker("host"):
        pytest.skip("says what happens on a CPU")
    with torch.device(DEVICE):
        yield

# SPDX-License-Identifier: Apache-2.0
"""The loss family under pytest-benchmark: loss and gradient, and the softmax that it shares."""

from __future__ import annotations

from typing import Any

import pytest

from .cases import Case
from .pytest_cases import parameters, time_it


@pytest.mark.parametrize(("case", "name"), parameters("loss"))
def test_loss(benchmark: Any, case: Case, name: str) -> None:
    time_it(benchmark, case, name, train=True)


@pytest.mark.parametrize(("case", "name"), parameters("softmax"))
def test_softmax(benchmark: Any, case: Case, name: str) -> None:
    time_it(benchmark, case, name, train=True)

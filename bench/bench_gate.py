# SPDX-License-Identifier: Apache-2.0
"""The gate family under pytest-benchmark: statistics, and the gate that decides who leaves."""

from __future__ import annotations

from typing import Any

import pytest

from .cases import Case
from .pytest_cases import parameters, time_it


@pytest.mark.parametrize(("case", "name"), parameters("statistics"))
def test_statistics(benchmark: Any, case: Case, name: str) -> None:
    time_it(benchmark, case, name, train=False)


@pytest.mark.parametrize(("case", "name"), parameters("gate"))
def test_gate(benchmark: Any, case: Case, name: str) -> None:
    time_it(benchmark, case, name, train=False)

# SPDX-License-Identifier: Apache-2.0
"""The gate family under pytest-benchmark: the statistics that decide which rows leave."""

from __future__ import annotations

from typing import Any

import pytest

from .cases import Case
from .pytest_cases import parameters, time_it


@pytest.mark.parametrize(("case", "name"), parameters("statistics"))
def test_statistics(benchmark: Any, case: Case, name: str) -> None:
    time_it(benchmark, case, name, train=False)

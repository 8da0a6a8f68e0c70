# SPDX-License-Identifier: Apache-2.0
"""`pytest bench`: the same cases under pytest-benchmark, `bench_*.py` being the test files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """Collects `bench_*.py` here, whatever the project's pattern for test files is."""
    if file_path.suffix == ".py" and file_path.name.startswith("bench_"):
        return pytest.Module.from_parent(parent, path=file_path)
    return None


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    """Results travel: what is said of the machine is what `msdkern bench` says of it."""
    from .machine import machine, software

    machine_info.clear()
    machine_info.update(machine(), **software())


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, Any]:
    """Replaces the plugin's own, which holds the host name."""
    return {}


@pytest.fixture(scope="session", autouse=True)
def _kept_memory() -> None:
    from .machine import keep_memory

    keep_memory()

# SPDX-License-Identifier: Apache-2.0
"""Tests that share a build go to one process, the long ones first."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from tests import sharing

ROOT = Path(__file__).resolve().parents[1]
TESTS = [
    "tests/cuda/test_loss.py::test_scores",
    "tests/cuda/test_sanitizers.py::test_every_home[asan-large]",
    "tests/cuda/test_sanitizers.py::test_every_home[tsan-large]",
    "tests/executors/test_triton_binaries.py::test_one",
    "tests/executors/test_triton_binaries.py::test_two[a-b]",
    "tests/install/test_build.py::test_wheel",
    "tests/nn/test_losses.py::test_one",
    "tests/cuda/test_gate.py::test_scores",
    "tests/nn/test_losses.py::TestTwo::test_two",
    "tests/cuda/test_sanitizers.py::test_every_home[asan-small]",
    "tests/install/test_fallback.py::test_wheel",
]
TOGETHER = [{5, 10}, {1, 9}, {2}, {0, 7}, {6, 8}, {3}, {4}]  # as they begin


@pytest.mark.parametrize("glob", [g for globs in sharing.TOGETHER.values() for g in globs])
def test_every_name_is_that_of_a_file(glob):
    assert list(ROOT.glob(glob.partition("::")[0]))


@pytest.mark.parametrize("glob", sharing.ALONE)
def test_files_whose_tests_are_alone_exist(glob):
    assert list(ROOT.glob(glob))


class Process:
    """In place of one of pytest-xdist's: notes what it is to run."""

    shutting_down = False

    def __init__(self):
        self.sent = []

    def send_runtest_some(self, indices):
        self.sent.append(set(indices))

    def shutdown(self):
        self.shutting_down = True


def test_the_scheduler_sends_them_together():
    pytest.importorskip("xdist")
    config = SimpleNamespace(option=SimpleNamespace(), getvalue=lambda name: ["popen"])
    scheduler = sharing.scheduler(config, None)
    process = Process()
    scheduler.add_node(process)
    tests = sorted(TESTS, key=sharing.place_of)  # as tests/conftest.py does
    scheduler.add_node_collection(process, tests)
    scheduler.schedule()
    for index in range(len(tests)):
        scheduler.mark_test_complete(process, index)
    found = [{TESTS.index(tests[i]) for i in indices} for indices in process.sent]
    assert found == TOGETHER

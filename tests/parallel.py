# SPDX-License-Identifier: Apache-2.0
"""Which tests one process runs where several share the work (`make test`).

Tests that share a build or a trained network stay together, so that nothing is built twice and no
two processes work in one folder; every other test is alone. What takes long comes first, so that
all processes end at about the same time.
"""

from __future__ import annotations

import re

# In the order in which they begin.
TOGETHER = tuple(
    re.compile(pattern)
    for pattern in (
        r"tests/cuda/test_(compact|gate|loss|softmax)\.py",
        r"tests/install/",
        r"tests/cuda/test_sanitizers\.py::.*\[asan",
        r"tests/cuda/test_sanitizers\.py::.*\[tsan",
        r"tests/cuda/test_sass\.py",
        r"tests/cuda/test_harness\.py",
        r"tests/native/test_sanitizers\.py",
        r"tests/train/test_parallel\.py",
        r"tests/integrations/test_two_processes\.py",
        r"tests/cli/test_calibrate_cli\.py",
        r"tests/cli/test_train_cli\.py",
    )
)
LONG = ("tests/executors/test_triton", "tests/native/test_processors", "tests/infer/test_export")


def place(nodeid: str) -> int:
    """When the tests that this one belongs to begin; of those that are alone, the long first."""
    for number, pattern in enumerate(TOGETHER):
        if pattern.match(nodeid):
            return number
    return len(TOGETHER) + (not nodeid.startswith(LONG))


def scheduler(config, log):
    from xdist.scheduler import LoadScopeScheduling

    class Together(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            number = place(nodeid)
            return TOGETHER[number].pattern if number < len(TOGETHER) else nodeid

    config.option.loadscopereorder = False  # by the number of tests, which says little
    return Together(config, log)

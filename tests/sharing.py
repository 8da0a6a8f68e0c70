# SPDX-License-Identifier: Apache-2.0
"""Which tests one process runs where several share the work (`make test`).

Tests that share a build stay together, so that nothing is built twice and no two processes work in
one folder. So do those of a file, but for files whose tests are long and share nothing. What takes
longest comes first and what takes least last, so that all processes end at about the same time.

The mark `xdist_group` would not do: pytest-xdist 3.8 does not see it where pytest is 9.2.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

# Globs of what takes longest, and of tests of several files that stay together, in the order in
# which they begin.
TOGETHER = {
    "sanitized": ("tests/native/test_sanitizers.py*",),
    "wheel": ("tests/install/test_build.py*", "tests/install/test_[fp]*.py*"),
    "asan": ("tests/cuda/test_sanitizers.py::*asan*",),
    "tsan": ("tests/cuda/test_sanitizers.py::*tsan*",),
    "interpreted losses": ("tests/executors/test_triton.py::*losses*",),
    "interpreted gates": ("tests/executors/test_triton.py::*gates*",),
    "cubins": ("tests/cuda/test_sass.py*",),
    "torchrun": ("tests/train/test_parallel.py*",),
    "processors": ("tests/native/test_processors.py*",),
    "emulated": ("tests/cuda/test_[cgl]o*.py*", "tests/cuda/test_gate.py*"),
}
# Files whose tests are alone, and come last.
ALONE = ("tests/executors/test_triton_*binaries.py", "tests/ops/test_compile.py")


def scope_of(nodeid: str) -> str:
    """The name of what is run by one process."""
    for name, globs in TOGETHER.items():
        if any(fnmatchcase(nodeid, glob) for glob in globs):
            return name
    file = nodeid.partition("::")[0]
    return nodeid if any(fnmatchcase(file, glob) for glob in ALONE) else file


def place_of(nodeid: str) -> int:
    """When it begins."""
    scope = scope_of(nodeid)
    if scope in TOGETHER:
        return list(TOGETHER).index(scope)
    return len(TOGETHER) + (scope == nodeid)


def scheduler(config, log):
    from xdist.scheduler import LoadScopeScheduling

    class Sharing(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return scope_of(nodeid)

    config.option.loadscopereorder = False  # by the number of tests, which says little
    return Sharing(config, log)

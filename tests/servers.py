# SPDX-License-Identifier: Apache-2.0
"""Who computes in a test: every executor that can run here, each instruction set by itself.

MSDKERN_TEST_DEVICE=cuda runs the tests of the ops on a GPU (see tests/conftest.py), and
MSDKERN_TEST_SERVERS=triton, or several joined by commas, on these executors alone.
"""

from __future__ import annotations

import contextlib
import os

from msdkern import executors

DEVICE = os.environ.get("MSDKERN_TEST_DEVICE", "cpu")


def _serves(name: str) -> bool:
    return executors.device_type(name) in (None, DEVICE) and executors.reason(name) is None


def _servers() -> tuple[str, ...]:
    chosen = os.environ.get("MSDKERN_TEST_SERVERS")
    if chosen:
        return tuple(chosen.split(","))
    found = [name for name in executors.EXECUTORS if name != "cpu" and _serves(name)]
    if _serves("cpu"):
        from msdkern import _cpu

        found += [f"cpu:{isa}" for isa in _cpu.isas()]
    return tuple(found)


SERVERS = _servers()
FASTEST = SERVERS[min(1, len(SERVERS) - 1)]


@contextlib.contextmanager
def serve(server):
    """Every op inside runs on this executor, with this instruction set."""
    name, _, isa = server.partition(":")
    with executors.executor(name):
        if not isa:
            yield name
            return
        from msdkern import _cpu

        _cpu.use_isa(isa)
        try:
            yield name
        finally:
            _cpu.use_isa("")

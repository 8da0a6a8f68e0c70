# SPDX-License-Identifier: Apache-2.0
"""Who computes in a test: every executor that can run here, each instruction set by itself."""

from __future__ import annotations

import contextlib

from msdkern import executors


def _servers() -> tuple[str, ...]:
    if executors.reason("cpu") is not None:
        return ("eager",)
    from msdkern import _cpu

    return ("eager", *(f"cpu:{isa}" for isa in _cpu.isas()))


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

# SPDX-License-Identifier: Apache-2.0
"""Peak memory of one call, forward and backward, above what was there before it.

On a GPU: the caching allocator's own peak. On a CPU: the running sum of every allocation and
release that PyTorch's allocator reports to its profiler. Stack space and the few kilobytes per
thread that a kernel may take from malloc by itself are not seen.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from .cases import READ_ONLY
from .contenders import Contender
from .problem import Problem


def peak_bytes(contender: Contender, problem: Problem) -> int:
    """Largest sum of live allocations during one warm call."""
    if problem.case.device == "cuda":
        return _device_peak(contender, problem)
    with _quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        _call(contender, problem)
    live = peak = 0
    for size in _changes(recorded):
        live += size
        peak = max(peak, live)
    return peak


def _changes(recorded: profile) -> list[int]:
    """Bytes allocated (+) and released (-), in order of time."""
    results: Any = recorded.profiler and recorded.profiler.kineto_results
    events = [e for e in results.events() if e.name() == "[memory]"]
    return [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The profiler's library announces itself on stderr from C++, past `sys.stderr`."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _device_peak(contender: Contender, problem: Problem) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    _call(contender, problem)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _call(contender: Contender, problem: Problem) -> None:
    with contender.session():
        if problem.case.family in READ_ONLY:
            with torch.no_grad():
                contender.infer()
        else:
            problem.gradients(contender.train())

# SPDX-License-Identifier: Apache-2.0
"""What a result must say about where it was taken, and nothing that names the computer."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch


def machine() -> dict[str, Any]:
    """Processor, cores, memory and GPU. No host name, no user, no path."""
    facts: dict[str, Any] = {
        "cpu": _cpu_model(),
        "architecture": platform.machine(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "simd": torch.backends.cpu.get_cpu_capability(),
        "gpu": None,
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts["gpu"] = {
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
        }
    return facts


def software() -> dict[str, Any]:
    """Versions of all that is compared, and the commit when it runs from a checkout."""
    import msdkern

    return {
        "python": platform.python_version(),
        "system": platform.system(),
        "torch": torch.__version__,
        "msdkern": msdkern.__version__,
        "isa": _isa(),
        "commit": _commit(),
    }


def keep_memory() -> bool:
    """Asks glibc to keep freed memory for the next call, for every contender alike.

    Otherwise a contender with large temporaries makes malloc hand pages back to the system, and
    the next one pays for faulting them in again: at 16 MB per gradient that alone costs six times
    the copy. True where malloc agreed.
    """
    trim_threshold, mmap_threshold, size = -1, -3, 1 << 30
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        return all(mallopt(option, size) for option in (mmap_threshold, trim_threshold))
    return False


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _isa() -> str | None:
    with contextlib.suppress(ImportError, AttributeError, IndexError):
        from msdkern import _cpu

        return str(_cpu.isas()[0])
    return None


def _commit() -> str | None:
    """The commit of this checkout, with `+` when files differ from it; None when installed."""
    here = Path(__file__).resolve().parent
    if not (here.parent / ".git").exists():
        return None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        head = _git(here, "rev-parse", "--short=12", "HEAD")
        changed = _git(
            here,
            "status",
            "--porcelain",
            "--untracked-files=no",
            "--",
            ".",
            "../csrc",
            "../msdkern",
        )
        return head + ("+" if changed else "")
    return None


def _git(where: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=where, capture_output=True, text=True, timeout=10, check=True
    )
    return done.stdout.strip()

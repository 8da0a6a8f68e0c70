# SPDX-License-Identifier: Apache-2.0
"""Machine code of compiled kernels: instructions and loops, as cuobjdump prints them."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tests.cuda.harness.build import CSRC

__all__ = ["CSRC", "NVCC", "Span", "inside", "instructions", "loops", "run", "smallest", "tool"]

NVCC = shutil.which("nvcc") or os.path.join(
    os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "nvcc"
)


def run(*command):
    return subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, check=True
    ).stdout


@functools.cache
def tool():
    """cuobjdump of the toolkit, or the one that Triton's package brings."""
    places = [Path(os.path.realpath(NVCC)).parent, *map(Path, os.environ["PATH"].split(":"))]
    triton = importlib.util.find_spec("triton")
    if triton is not None:
        places.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    return next((p / "cuobjdump" for p in places if (p / "cuobjdump").exists()), None)


def instructions(cubin):
    """name -> [(address, text)] of every kernel; a mangled name as the source has it."""
    kernels = {}
    for part in re.split(r"\s+Function : ", run(tool(), "-sass", cubin))[1:]:
        name, body = part.split("\n", 1)
        plain = re.match(r"_ZN7msdkern(\d+)(\w+)", name)
        name = plain.group(2)[: int(plain.group(1))] if plain else name
        found = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+ +)?([^;/]*);", body)
        kernels[name] = [(int(address, 16), text) for address, text in found]
    return kernels


def _target(text):
    """Where a branch goes; None for what is none."""
    branch = re.match(r"BRA(?:\.\w+)*\s+(?:!?U?P\w+,\s*)?`?\(?0x([0-9a-f]+)", text)
    return int(branch.group(1), 16) if branch else None


def loops(code):
    """(first, last) address of every loop: of each branch backwards."""
    ways = {(_target(text), address) for address, text in code}
    return sorted((to, at) for to, at in ways if to is not None and to < at)


class Span(Counter[str]):
    """How often each instruction is in a span of code: `LDS`, and `LDS.128` where that is its
    width; "all" of them."""

    begin = end = 0

    @classmethod
    def of(cls, code: list[tuple[int, str]], begin: int, end: int, *rare: str) -> Span:
        """From `begin` to `end`. Left out is what a branch leaves out that has an instruction that
        is named `rare`."""
        span = cls()
        span.begin, span.end = begin, end
        body = [(address, text) for address, text in code if begin <= address <= end]
        left_out = [_around(body, at) for at, text in body if text.split(".")[0].split()[0] in rare]
        for address, text in body:
            if any(first < address < last for first, last in left_out):
                continue
            name, *modifiers = text.split()[0].split(".")
            span.update([name, *(f"{name}.{m}" for m in modifiers if m in ("128", "EX2"))])
            span["all"] += 1
        return span


MOST_LEFT_OUT = 0x700  # bytes of code: no branch leaves out more of what is rare


def _around(body: list[tuple[int, str]], at: int) -> tuple[int, int]:
    """The longest way around an address: the branch before it, and where that goes."""
    ways = [(address, _target(text)) for address, text in body]
    over = [(a, t) for a, t in ways if t is not None and a < at < t <= a + MOST_LEFT_OUT]
    return max(over, key=lambda way: way[1] - way[0], default=(at, at))


def inside(spans: Iterable[Span], outer: Span) -> list[Span]:
    """Those that are a part of another."""
    return [s for s in spans if outer.begin <= s.begin and s.end <= outer.end and s is not outer]


def smallest(spans: Iterable[Span]) -> Span:
    return min(spans, key=lambda s: s["all"])

# SPDX-License-Identifier: Apache-2.0
"""Machine code of compiled kernels: instructions and loops, as cuobjdump prints them."""

import functools
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

from tests.cuda.harness.build import CSRC

__all__ = ["CSRC", "NVCC", "instructions", "loops", "run", "tool"]

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


def loops(code):
    """(first, last) address of every loop: of each branch backwards."""
    found = set()
    for address, text in code:
        branch = re.match(r"BRA(?:\.\w+)*\s+(?:!?U?P\w+,\s*)?`?\(?0x([0-9a-f]+)", text)
        if branch and int(branch.group(1), 16) < address:
            found.add((int(branch.group(1), 16), address))
    return sorted(found)

# SPDX-License-Identifier: Apache-2.0
"""The hash that ties a native module to the sources it was built from.

Run as a script by CMake (it prints the hash) and imported by `msdkern doctor`, which compares.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SUFFIXES = frozenset({".h", ".cpp", ".cu", ".cuh"})


def present(root: Path = ROOT) -> bool:
    """Whether the native sources lie beside the package, as in a checkout."""
    return (root / "csrc").is_dir() and (root / "CMakeLists.txt").is_file()


def source_hash(root: Path = ROOT) -> str:
    """sha256 over names and contents of csrc's C++ and CUDA files and of CMakeLists.txt."""
    sources = sorted(p for p in (root / "csrc").rglob("*") if p.suffix in SUFFIXES)
    digest = hashlib.sha256()
    for path in [root / "CMakeLists.txt", *sources]:
        # A checkout on another system may end lines otherwise; it is the same source.
        text = path.read_bytes().replace(b"\r\n", b"\n")
        digest.update(f"{path.relative_to(root).as_posix()}\0{len(text)}\0".encode() + text)
    return digest.hexdigest()


if __name__ == "__main__":
    print(source_hash())

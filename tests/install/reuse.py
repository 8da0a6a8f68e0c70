# SPDX-License-Identifier: Apache-2.0
"""A compiler launcher: what the checkout's own build made by the same command is not made again.

    python reuse.py COMPILER FLAGS... -o OBJECT -c SOURCE

The kernels take minutes, and whoever runs the tests has just built them. An object is taken from
there if its command has the words of this one but for the folder of the sources (CMakes differ in
their order), if the sources are the same, and if it is newer than those that it was made of; else
the compiler is called.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def sources(tree: Path) -> dict[Path, bytes]:
    csrc = tree / "csrc"
    return {p.relative_to(csrc): p.read_bytes() for p in csrc.rglob("*") if p.is_file()}


def ninja(build: Path, *words: str) -> str:
    """What a tool of ninja's says; nothing is written."""
    return subprocess.run(
        ["ninja", "-n", "-C", build, *words], text=True, capture_output=True
    ).stdout


def is_new(build: Path, target: str) -> bool:
    """Whether nothing that an object was made of has changed since."""
    title, *files = ninja(build, "-t", "deps", target).splitlines() or [""]
    made = (build / target).stat().st_mtime
    read = [build / line.strip() for line in files if line.strip()]
    return "(VALID)" in title and all(p.exists() and p.stat().st_mtime < made for p in read)


def made_before(command: list[str], root: Path = ROOT) -> Path | None:
    """The object that the build in `root` made by this command, or None."""
    build = root / "build" / sys.implementation.cache_tag
    target, source = (command[command.index(flag) + 1] for flag in ("-o", "-c"))
    tree = next((p.parent for p in Path(source).parents if p.name == "csrc"), None)
    if tree is None or not (build / target).is_file() or not shutil.which("ninja"):
        return None
    theirs = ninja(build, "-t", "commands", "-s", target).replace(f"{root}/csrc/", f"{tree}/csrc/")
    same = sorted(shlex.split(theirs)) == sorted(command) and sources(tree) == sources(root)
    return build / target if same and is_new(build, target) else None


def main(command: list[str]) -> int:
    made = made_before(command)
    if made is None:
        return subprocess.run(command).returncode
    shutil.copyfile(made, command[command.index("-o") + 1])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

# SPDX-License-Identifier: Apache-2.0
"""A compiler launcher: what the checkout's own build made by the same command is not made again.

    python reuse.py COMPILER FLAGS... -o OBJECT -c SOURCE

The kernels take minutes, and whoever runs the tests has just built them. An object is taken from
there if its command is this one but for the folder of the sources, if the sources are the same, and
if it is newer than all of them; else the compiler is called.
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


def command_of(build: Path, target: str) -> str:
    """The command by which ninja makes an object."""
    done = subprocess.run(
        ["ninja", "-C", build, "-t", "commands", "-s", target], text=True, capture_output=True
    )
    return done.stdout


def made_before(command: list[str], root: Path = ROOT) -> Path | None:
    """The object that the build in `root` made by this command, or None."""
    build = root / "build" / sys.implementation.cache_tag
    target, source = (command[command.index(flag) + 1] for flag in ("-o", "-c"))
    made = build / target
    tree = next((p.parent for p in Path(source).parents if p.name == "csrc"), None)
    if tree is None or not made.is_file():
        return None
    newest = max(p.stat().st_mtime for p in (root / "csrc").rglob("*"))
    same = command_of(build, target).replace(f"{root}/csrc/", f"{tree}/csrc/")
    if shlex.split(same) != command or newest >= made.stat().st_mtime:
        return None
    return made if sources(tree) == sources(root) else None


def main(command: list[str]) -> int:
    made = made_before(command)
    if made is None:
        return subprocess.run(command).returncode
    shutil.copyfile(made, command[command.index("-o") + 1])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

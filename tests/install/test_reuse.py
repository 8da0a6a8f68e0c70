# SPDX-License-Identifier: Apache-2.0
"""Objects of the checkout's build stand for those of a wheel only where they are the same."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from tests.install.reuse import made_before

TARGET = "kernels.dir/a.cpp.o"
BUILD = f"build/{sys.implementation.cache_tag}"
SAME = ("-DONE", "-MD")  # flags
RULES = """
rule compile
  command = g++ -DONE -MD -MF $out.d -o $out -c $in
  depfile = $out.d
  deps = gcc
build {target}: compile {root}/csrc/a.cpp
"""


@pytest.fixture
def trees(tmp_path):
    """A checkout that is built, and another tree of the same sources."""
    root, tree = tmp_path / "root", tmp_path / "tree"
    for csrc in (root / "csrc", tree / "csrc"):
        csrc.mkdir(parents=True)
        (csrc / "a.cpp").write_text('#include "a.h"\n')
        (csrc / "a.h").write_text("inline int a;\n")
        (csrc / "unused.h").write_text("inline int unused;\n")
    build = root / BUILD
    build.mkdir(parents=True)
    (build / "build.ninja").write_text(RULES.format(target=TARGET, root=root).lstrip())
    if not (shutil.which("ninja") and shutil.which("g++")):
        pytest.skip("ninja and g++ are needed")
    for path in (root / "csrc").iterdir():
        os.utime(path, (0, 0))
    subprocess.run(["ninja", "-C", build], check=True, capture_output=True)
    return root, tree


def ask(trees, *flags):
    flags = flags or SAME
    root, tree = trees
    command = ["g++", *flags, "-MF", f"{TARGET}.d", "-o", TARGET]
    return made_before([*command, "-c", f"{tree}/csrc/a.cpp"], root)


@pytest.mark.parametrize("flags", [SAME, SAME[::-1]], ids=str)
def test_the_same_command_of_the_same_sources(trees, flags):
    assert ask(trees, *flags) == trees[0] / BUILD / TARGET


@pytest.mark.parametrize("flags", [("-DTWO", "-MD"), (*SAME, "-O2"), SAME[:1]], ids=str)
def test_another_command(trees, flags):
    assert ask(trees, *flags) is None


@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize("name", ["a.cpp", "a.h", "new.h"])
def test_other_sources(trees, where, name):
    """However old."""
    changed = trees[where] / "csrc" / name
    changed.write_text("inline int b;\n")
    os.utime(changed, (0, 0))
    assert ask(trees) is None


@pytest.mark.parametrize(("name", "stands"), [("a.cpp", False), ("a.h", False), ("unused.h", True)])
def test_sources_changed_since(trees, name, stands):
    later = (trees[0] / BUILD / TARGET).stat().st_mtime + 1
    os.utime(trees[0] / "csrc" / name, (later, later))
    assert (ask(trees) is not None) == stands


def test_an_object_of_unknown_origin(trees):
    (trees[0] / BUILD / ".ninja_deps").unlink()
    assert ask(trees) is None


def test_no_object(trees):
    (trees[0] / BUILD / TARGET).unlink()
    assert ask(trees) is None

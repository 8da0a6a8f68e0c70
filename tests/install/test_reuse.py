"""Objects of the checkout's build stand for those of a wheel only where they are the same."""

from __future__ import annotations

import os
import sys

import pytest

from tests.install.reuse import made_before

TARGET = "kernels.dir/a.cpp.o"
RULES = """
rule compile
  command = c++ -O3 -o $out -c $in
build {target}: compile {root}/csrc/a.cpp
"""


@pytest.fixture
def trees(tmp_path):
    """A checkout with its build, and another tree of the same sources."""
    trees = tmp_path / "root", tmp_path / "tree"
    for tree in trees:
        (tree / "csrc").mkdir(parents=True)
        (tree / "csrc" / "a.cpp").write_text('#include "a.h"\n')
        (tree / "csrc" / "a.h").write_text("int a;\n")
    made = trees[0] / "build" / sys.implementation.cache_tag / TARGET
    made.parent.mkdir(parents=True)
    made.write_bytes(b"object")
    later = (trees[0] / "csrc" / "a.h").stat().st_mtime + 10
    os.utime(made, (later, later))
    rules = RULES.format(target=TARGET, root=trees[0])
    (made.parents[1] / "build.ninja").write_text(rules.lstrip())
    return (*trees, made)


def ask(root, tree, *flags):
    command = ["c++", *(flags or ("-O3",)), "-o", TARGET, "-c", f"{tree}/csrc/a.cpp"]
    return made_before(command, root)


def test_the_same_command_of_the_same_sources(trees):
    root, tree, made = trees
    assert ask(root, tree) == made


@pytest.mark.parametrize("flags", [("-O2",), ("-O3", "-DMORE")])
def test_another_command(trees, flags):
    root, tree, _ = trees
    assert ask(root, tree, *flags) is None


@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize("name", ["a.cpp", "a.h", "new.h"])
def test_other_sources(trees, where, name):
    root, tree, made = trees
    changed = trees[where] / "csrc" / name
    changed.write_text("int b;\n")
    os.utime(changed, (0, 0))  # it is the contents that count
    assert ask(root, tree) is None
    (trees[1 - where] / "csrc" / name).write_text("int b;\n")
    os.utime(trees[1 - where] / "csrc" / name, (0, 0))
    os.utime(root / "csrc", (0, 0))
    assert ask(root, tree) == made


def test_sources_changed_since(trees):
    root, tree, made = trees
    later = made.stat().st_mtime + 1
    os.utime(root / "csrc" / "a.h", (later, later))
    assert ask(root, tree) is None


def test_no_build(trees):
    root, tree, made = trees
    made.unlink()
    assert ask(root, tree) is None

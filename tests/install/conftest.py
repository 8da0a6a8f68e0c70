"""What the install tests share: one tree, one build environment without PyTorch, one wheel.

The builds call the PEP 517 hooks of the build backend, as every installer does, in an interpreter
that can import the build requirements and nothing else.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
BUILD_REQUIREMENTS = ("setuptools", "pybind11", "ninja", "cmake")
TREE = ("csrc", "msdkern", "bench", "tests", ".ci", ".clang-format", "CMakeLists.txt", "LICENSE")
TREE += ("MANIFEST.in", "Makefile", "README.md", "pyproject.toml")
TREE += ("requirements-dev.txt", "requirements-trainers.txt")
TREE += ("setup.py",)
JUNK = shutil.ignore_patterns("*.so", "_build.json", "__pycache__", "*.egg-info")
NVCC = os.environ.get("CUDACXX", "nvcc")
HAS_NVCC = bool(shutil.which(NVCC) or shutil.which("/usr/local/cuda/bin/nvcc"))
# What CMake takes from the environment when it first sees a build folder. How fast the kernels are
# is not asked here, and what the compiler makes of them for GPUs is in tests/cuda/test_sass.py.
FASTER = {
    "CMAKE_CXX_COMPILER_LAUNCHER": f"{sys.executable};{Path(__file__).with_name('reuse.py')}",
    "CUDAFLAGS": "-Xcicc -O1 -Xptxas -O1",
}
SWITCHES = ("CXX", "CC", "CUDACXX", "CMAKE_ARGS", "PYTHONPATH", "MSDKERN_CUDA", "MSDKERN_ARCHS")


def run(command, *, cwd, **variables):
    """A finished process, its words in .stdout; a variable of None is taken out."""
    environment = {k: v for k, v in os.environ.items() if k not in SWITCHES}
    environment |= {"OMP_NUM_THREADS": "1", **variables}
    environment = {k: str(v) for k, v in environment.items() if v is not None}
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )


def checked(command, *, cwd, **variables):
    done = run(command, cwd=cwd, **variables)
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def make_venv(folder):
    """A bare environment: the interpreter, its folder of packages."""
    checked([sys.executable, "-m", "venv", "--without-pip", folder], cwd=folder.parent)
    python = folder / "bin" / "python"
    site = checked([python, "-c", "import site; print(site.getsitepackages()[0])"], cwd=folder)
    return python, Path(site.strip())


def call_hook(python, hook, tree, out, **variables):
    """Run one PEP 517 hook in a source tree; the process, and the file it made in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    program = f"from setuptools import build_meta as b; b.{hook}({str(out)!r})"
    done = run([python, "-c", program], cwd=tree, **variables)
    return done, next(iter(out.iterdir()), None)


def copy_tree(source, target):
    """The project's own files, without what was built beside them."""
    target.mkdir(parents=True)
    for name in TREE:
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name, ignore=JUNK)
        else:
            shutil.copy2(source / name, target / name)
    return target


@dataclass(frozen=True)
class Installed:
    """The package in an environment of its own, which borrows PyTorch from the tests' one."""

    python: Path
    site: Path

    def ask(self, program, **variables):
        return checked([self.python, "-c", program], cwd=self.site.parent, **variables).strip()

    def doctor(self, *options):
        return checked([self.python, "-m", "msdkern", "doctor", *options], cwd=self.site.parent)


def install(wheel, folder):
    python, site = make_venv(folder)
    borrowed = Path(torch.__file__).resolve().parents[1]
    (site / "borrowed.pth").write_text(f"{borrowed}\n")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-deps"]
    checked([*pip, wheel], cwd=folder)
    return Installed(python, site)


@pytest.fixture(scope="session")
def build_python(tmp_path_factory):
    """An interpreter with the build requirements, and without anything else."""
    python, site = make_venv(tmp_path_factory.mktemp("build-env") / "venv")
    for name in BUILD_REQUIREMENTS:
        distribution = importlib.metadata.distribution(name)
        for top in {path.parts[0] for path in distribution.files if path.parts[0] != ".."}:
            if not (site / top).exists():
                (site / top).symlink_to(distribution.locate_file(top))
    for tool in ("cmake", "ninja"):
        launcher = f"#!{python}\nimport sys, {tool}\nsys.exit({tool}.{tool}())\n"
        (python.parent / tool).write_text(launcher)
        (python.parent / tool).chmod(0o755)
    return python


@pytest.fixture(scope="session")
def sdist(build_python, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdist")
    tree = copy_tree(ROOT, folder / "tree")
    (tree / "msdkern" / "_cpu.cpython-311-x86_64-linux-gnu.so").write_bytes(b"left over")
    (tree / "msdkern" / "_build.json").write_text("{}")
    done, path = call_hook(build_python, "build_sdist", tree, folder / "dist")
    assert done.returncode == 0, done.stdout
    return path


@pytest.fixture(scope="session")
def tree(sdist, tmp_path_factory):
    """The unpacked sdist, in which the native modules are built once."""
    folder = tmp_path_factory.mktemp("tree")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder)
    (unpacked,) = folder.iterdir()
    return unpacked


@pytest.fixture(scope="session")
def wheel(build_python, tree, tmp_path_factory):
    """Built from the sdist, with the CUDA module where nvcc is found."""
    out = tmp_path_factory.mktemp("wheel")
    done, path = call_hook(build_python, "build_wheel", tree, out, MSDKERN_ARCHS="90", **FASTER)
    assert done.returncode == 0, done.stdout
    return path


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory):
    return install(wheel, tmp_path_factory.mktemp("installed") / "venv")

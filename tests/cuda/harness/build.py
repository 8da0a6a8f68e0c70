# SPDX-License-Identifier: Apache-2.0
"""Compiles CUDA sources for the host, with the scheduler that runs their kernels on the CPU."""

import functools
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[2] / "csrc"
RUNTIME = ("fiber.cpp", "scheduler.cpp", "barriers.cpp", "memory.cpp", "launch.cpp")
ARCHITECTURE = 900  # the code paths that are taken
COMMON = (
    "-std=c++17", "-fPIC", "-g1", "-fno-omit-frame-pointer", "-fvisibility=hidden",
    "-fno-strict-aliasing",  # as nvcc treats device code
)  # fmt: skip
KERNELS = (
    *COMMON, "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-unused-parameter",
    f"-D__CUDA_ARCH__={ARCHITECTURE}", f"-D__CUDA_ARCH_LIST__={ARCHITECTURE}",
    "-I", str(HERE / "shims"),
)  # fmt: skip
# mode -> flags of the kernels, flags of the scheduler, which sanitizers must not look at but must
# hear from, and what the linker needs.
MODES = {
    "plain": ((), (), ()),
    "asan": (
        ("-fsanitize=address,bounds,alignment", "-fno-sanitize-recover=all"),
        ("-DSIMT_ASAN", "-fno-builtin"),
        ("-fsanitize=address,undefined",),
    ),
    "tsan": (("-fsanitize=thread",), ("-DSIMT_TSAN", "-fno-builtin"), ("-fsanitize=thread",)),
}
OPTIONS = {  # of the sanitizers' runtimes
    "plain": {},
    "asan": {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"},
    "tsan": {"TSAN_OPTIONS": "halt_on_error=1 exitcode=66"},
}
ORDERS = ("fifo", "lifo", "1", "2", "3", "4", "5")


def missing(mode="plain"):
    """Why this mode cannot be built here, or None."""
    if not shutil.which("g++"):
        return "g++ is not installed"
    for library in {"asan": ("asan", "ubsan"), "tsan": ("tsan",)}.get(mode, ()):
        if not Path(_library(library)).is_absolute():
            return f"g++ has no lib{library}"
    return None


@functools.cache
def _library(name):
    return run("g++", f"-print-file-name=lib{name}.so").strip()


def run(*command):
    command = [str(word) for word in command]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-8000:]}")
    return done.stdout


@functools.cache
def _work():
    return tempfile.TemporaryDirectory(prefix="simt-")  # removed with the process


def _compile_all(jobs):
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda job: run(*job), jobs))


@functools.cache
def runtime(mode):
    """The scheduler's objects, compiled once per process."""
    folder = Path(_work().name) / f"runtime-{mode}"
    folder.mkdir()
    objects = [folder / f"{Path(name).stem}.o" for name in RUNTIME]
    _compile_all(
        ("g++", *COMMON, "-O2", *MODES[mode][1], "-I", HERE, "-c", HERE / name, "-o", out)
        for name, out in zip(RUNTIME, objects, strict=True)
    )
    return tuple(objects)


@functools.cache
def shadowed():
    """csrc/ as links, with the headers of harness/shadow in place of those that hold PTX.

    A header of the same folder wins over every search path, hence a tree and not a flag.
    """
    root = Path(_work().name) / "csrc"
    for source in CSRC.rglob("*"):
        relative = source.relative_to(CSRC)
        shadow = HERE / "shadow" / relative
        if source.is_file():
            (root / relative).parent.mkdir(parents=True, exist_ok=True)
            (root / relative).symlink_to(shadow if shadow.exists() else source)
    return root


def compile_host(sources, out, mode="plain", flags=(), executable=False, optimize="-O1"):
    """Builds .cu (and .cpp) sources into `out`: a shared library, or an executable."""
    sources, out = [Path(source).resolve() for source in sources], Path(out)
    objects = [out.with_name(f"{out.name}.{i}.o") for i in range(len(sources))]
    root = shadowed()
    moved = [root / s.relative_to(CSRC) if s.is_relative_to(CSRC) else s for s in sources]
    kernels, _, link = MODES[mode]
    _compile_all(
        ("g++", *KERNELS, optimize, *kernels, "-iquote", root, f"-ffile-prefix-map={root}={CSRC}",
         *flags, "-x", "c++", "-c", source, "-o", target)
        for source, target in zip(moved, objects, strict=True)
    )  # fmt: skip
    shape = () if executable else ("-shared",)
    run("g++", *shape, *link, *objects, *runtime(mode), "-o", out, "-lpthread")
    return out


def compile_module(folder, mode="plain", flags=(), optimize="-O1", instead=None):
    """Builds _cuda, as CMakeLists.txt does but for the host, into a folder to import it from.

    `instead`: sources that take the place of those of csrc/cuda with the given names.
    """
    import pybind11

    sources = [*sorted((CSRC / "cuda").glob("*.cu")), *sorted((CSRC / "cuda").glob("*.cpp"))]
    sources = [(instead or {}).get(source.name, source) for source in sources]
    includes = ("-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include"))
    flags = (*flags, *includes, '-DMSDKERN_SOURCE_HASH="harness"')
    out = Path(folder) / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    return compile_host(sources, out, mode, flags, optimize=optimize)


def environment(mode, order="fifo", python=False):
    """Variables for a process that runs such a build; `python`: it loads one as a library."""
    variables = os.environ | OPTIONS[mode] | {"SIMT_ORDER": str(order)}
    if python and mode != "plain":
        variables["LD_PRELOAD"] = _library(mode)
    return variables


def start(program, *arguments, mode="plain", order="fifo", timeout=120, **variables):
    """A finished process with its words in .stdout. A Python file runs under this Python."""
    python = str(program).endswith(".py")
    command = [str(word) for word in ((sys.executable,) if python else ()) + (program, *arguments)]
    return subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        env=environment(mode, order, python) | variables, timeout=timeout,
    )  # fmt: skip

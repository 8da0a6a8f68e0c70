# SPDX-License-Identifier: Apache-2.0
"""Builds of the kernels that the package does not ship: sanitized, wider, for another processor."""

import functools
import os
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
COMMON = (
    "-std=c++17", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fPIC",
    "-fvisibility=hidden", "-fopenmp", "-iquote", str(CSRC),
)  # fmt: skip
ISAS = {
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "baseline": (),
}
# The checks of pointers for null and for size are left out: the address sanitizer does better.
SANITIZE = (
    "-fsanitize=address,undefined", "-fno-sanitize=null,object-size,vptr",
    "-fno-sanitize-recover=undefined", "-g1",
)  # fmt: skip


def run(*command, **variables):
    """A finished process with its words in .stdout."""
    environment = os.environ | {"OMP_NUM_THREADS": "2"} | variables
    return subprocess.run(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        check=False,
    )


def checked(*command, **variables):
    done = run(*command, **variables)
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


@functools.cache
def usable_isas():
    """What this processor runs, by the names that the dispatcher goes by."""
    from msdkern import _cpu

    return tuple(_cpu.isas())


@pytest.fixture(scope="session")
def sanitized(tmp_path_factory):
    """A folder with a sanitized `_cpu`. Instruction sets that cannot run here are left out."""
    import pybind11

    folder = tmp_path_factory.mktemp("sanitized")
    includes = (f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}")
    names = usable_isas()
    sources = [(f"kernels_{n}", "cpu/kernels.cpp", (f"-DMSDKERN_ISA={n}", *ISAS[n])) for n in names]
    sources += [("dispatch", "cpu/dispatch.cpp", ()), ("bind", "bind.cpp", includes)]

    def compiled(name, source, flags):
        to = folder / f"{name}.o"
        checked("g++", *COMMON, *SANITIZE, "-O0", *flags, "-c", CSRC / source, "-o", to)
        return to

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda given: compiled(*given), sources))
    # The dispatcher asks for all tables; those left out stand for the baseline and are not chosen.
    absent = [n for n in ISAS if n not in names] if "avx2" in names or "avx512" in names else []
    aliases = [f"-Wl,--defsym=msdkern_kernels_{n}=msdkern_kernels_baseline" for n in absent]
    module = folder / f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
    checked("g++", "-shared", *COMMON, *SANITIZE, *aliases, *objects, "-o", module)
    return folder


@pytest.fixture
def drive(sanitized):
    """Runs numpy_driver.py on the sanitized module."""
    runtime = checked("g++", "-print-file-name=libasan.so").strip()

    def start(*arguments):
        return run(
            sys.executable, HERE / "numpy_driver.py", sanitized, *arguments,
            LD_PRELOAD=runtime, ASAN_OPTIONS="detect_leaks=0", UBSAN_OPTIONS="print_stacktrace=1",
        )  # fmt: skip

    return start

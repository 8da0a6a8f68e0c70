# SPDX-License-Identifier: Apache-2.0
"""driver.cpp for vector widths and processors that the machine running the tests may lack."""

import os
import shutil
import subprocess
import sys

import pytest

from tests.native.conftest import COMMON, CSRC, HERE, checked, run, usable_isas

# name -> compiler, flags, how to run it. 64-byte vectors are the lanes of AVX-512, lowered to
# whatever the processor has.
TOOLCHAINS = {
    "64-byte vectors": ("g++", ("-DMSDKERN_VECTOR_BYTES=64",), ()),
    "32-byte vectors": ("clang++", ("-DMSDKERN_VECTOR_BYTES=32", "-fno-openmp"), ()),
    "aarch64": (
        "aarch64-linux-gnu-g++",
        ("-DDRIVER_DISPATCH", "-static"),
        ("qemu-aarch64",),
    ),
}
FOUND = [
    name
    for name, (compiler, _, runner) in TOOLCHAINS.items()
    if all(shutil.which(tool) for tool in (compiler, *runner))
]


@pytest.mark.parametrize("name", FOUND)
def test_kernels_agree_with_scalar_formulas(name, tmp_path):
    compiler, flags, runner = TOOLCHAINS[name]
    flags = (*COMMON, *flags, "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-psabi")
    sources = [CSRC / "cpu" / "kernels.cpp", HERE / "driver.cpp"]
    if "-DDRIVER_DISPATCH" in flags:
        sources.append(CSRC / "cpu" / "dispatch.cpp")
    else:
        flags = (*flags, "-DMSDKERN_ISA=baseline")
    checked(compiler, *flags, *sources, "-o", tmp_path / "driver")
    done = run(*runner, tmp_path / "driver")
    assert done.returncode == 0, done.stdout
    assert " 0 wrong" in done.stdout


@pytest.mark.parametrize(
    ("capability", "isa"), [("default", "baseline"), ("avx2", "avx2"), ("?", None)]
)
def test_the_bound_of_pytorch_is_kept(capability, isa):
    free = usable_isas()
    if isa not in (None, *free):
        pytest.skip(f"this processor does not run {isa}")
    expected = (isa, *(name for name in free if name != isa)) if isa else free
    program = "from msdkern import _cpu; print(*_cpu.isas())"
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert tuple(done.stdout.split()) == expected

# SPDX-License-Identifier: Apache-2.0
"""driver.cpp for vector widths and processors that the machine running the tests may lack."""

import shutil

import pytest

from tests.native.conftest import COMMON, CSRC, HERE, checked, run

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

"""From the source distribution to an installed wheel, built where there is no PyTorch."""

from __future__ import annotations

import json
import re
import subprocess
import tarfile
import zipfile

import pytest

from tests.install.conftest import HAS_NVCC, ROOT, run

MODULES = ["_cpu", "_cuda"] if HAS_NVCC else ["_cpu"]
# Everything else that a module needs must be inside it.
SYSTEM_LIBRARIES = r"(libstdc\+\+|libgcc_s|libc|libm|libdl|librt|libpthread|libgomp|ld-linux.*)\.so"


def tool(*command):
    return subprocess.run(command, check=True, text=True, capture_output=True).stdout


def module_path(installed, name):
    (path,) = (installed.site / "msdkern").glob(f"{name}.*.so")
    return path


def test_sdist_holds_all_that_a_build_needs(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = {"setup.py", "CMakeLists.txt", "pyproject.toml", "LICENSE", "README.md", "Makefile"}
    needed |= {"requirements-dev.txt", "requirements-trainers.txt"}
    needed |= {"msdkern/py.typed", "bench/__init__.py", ".ci/run"}
    folders = [ROOT / "csrc", ROOT / "bench", ROOT / "tests", ROOT / "msdkern"]
    sources = [p for f in folders for p in f.rglob("*") if p.suffix in (".py", ".h", ".cpp", ".cu")]
    needed |= {path.relative_to(ROOT).as_posix() for path in sources}
    assert needed - names == set()


def test_sdist_holds_nothing_built(sdist):
    with tarfile.open(sdist) as archive:
        names = archive.getnames()
    assert [n for n in names if n.endswith((".so", ".pyc", "_build.json"))] == []


@pytest.mark.parametrize("package", ["torch", "numpy", "triton"])
def test_the_build_environment_lacks(build_python, tmp_path, package):
    done = run([build_python, "-c", f"import {package}"], cwd=tmp_path)
    assert done.returncode != 0
    assert f"No module named '{package}'" in done.stdout


def test_wheel_contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = [n for n in names if n.endswith(".dist-info/METADATA")]
        text = archive.read(metadata).decode()
    assert {"msdkern/py.typed", "msdkern/_build.json", "msdkern/bench/__init__.py"} <= names
    native = sorted(name.split(".")[0] for name in names if name.endswith(".so"))
    assert native == [f"msdkern/{module}" for module in MODULES]
    assert {name.split("/")[0].split("-")[0] for name in names} == {"msdkern"}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "License-Expression: Apache-2.0" in text
    unconditional = re.findall(r"^Requires-Dist: ([^;\n]+)$", text, re.MULTILINE)
    assert sorted(re.split(r"[^\w]", name)[0] for name in unconditional) == ["numpy", "torch"]


def test_wheel_is_for_this_python_and_platform(wheel):
    assert "-none-any" not in wheel.name


def test_record_names_what_was_built(installed):
    record = json.loads((installed.site / "msdkern" / "_build.json").read_text())
    assert record["missing"]["_cpu"] is None
    assert (record["missing"]["_cuda"] is None) == HAS_NVCC
    assert record["archs"] == (["90"] if HAS_NVCC else [])
    assert "baseline" in record["isas"]
    assert re.fullmatch("[0-9a-f]{64}", record["source_hash"])
    assert "/" not in record["compiler"]


def test_native_module_answers(installed):
    program = "from msdkern import _cpu; print(_cpu.source_hash, _cpu.isas()[-1])"
    record = json.loads((installed.site / "msdkern" / "_build.json").read_text())
    assert installed.ask(program) == f"{record['source_hash']} baseline"


def test_the_command_and_the_benchmarks_are_installed(installed):
    script = installed.python.parent / "msdkern"
    assert "doctor" in run([script, "--help"], cwd=installed.site.parent).stdout
    where = installed.ask("import msdkern.bench; print(msdkern.bench.__file__)")
    assert where == str(installed.site / "msdkern" / "bench" / "__init__.py")


def test_doctor_of_the_wheel(installed):
    facts = json.loads(installed.doctor("--json").splitlines()[-1])
    assert facts["modules"]["_cpu"]["reason"] is None
    assert facts["self_test"]["eager"]["ok"]
    assert facts["cpu"]["chosen"] == facts["cpu"]["isas"][0]
    assert ("architectures" in facts["cuda"]) == HAS_NVCC
    if HAS_NVCC:
        assert facts["cuda"]["architectures"] == [90]
        assert facts["cuda"]["status"] in ("no driver", "no device", "ok")


@pytest.mark.parametrize("name", MODULES)
def test_links_the_system_and_nothing_else(installed, name):
    dynamic = tool("readelf", "-dW", module_path(installed, name))
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic)
    assert needed
    assert [lib for lib in needed if not re.match(SYSTEM_LIBRARIES, lib)] == []
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic


@pytest.mark.parametrize("name", MODULES)
def test_exports_only_its_entry(installed, name):
    lines = tool("nm", "-D", "--defined-only", module_path(installed, name)).splitlines()
    # Weak copies of the standard library's templates are every C++ library's.
    strong = [line.split()[-1] for line in lines if line.split()[-2] in "TDBR"]
    assert strong == [f"PyInit_{name}"]


def test_instruction_sets_do_not_leak(wheel, tree):
    """A weak function compiled for AVX-512 may be the one copy the linker keeps for everybody.

    So an object's weak symbols must bear its own instruction set's name; `DW.ref` are pointers.
    """
    objects = sorted((tree / "build").glob("*/CMakeFiles/kernels_*.dir/**/*.o"))
    assert objects
    for path in objects:
        (isa,) = (part[len("kernels_") : -len(".dir")] for part in path.parts if ".dir" in part)
        lines = tool("nm", "-C", "--defined-only", path).splitlines()
        weak = [line for line in lines if re.match(r"\S+ [WVu] (?!DW\.ref)", line)]
        assert [line for line in weak if f"msdkern_{isa}::" not in line] == []

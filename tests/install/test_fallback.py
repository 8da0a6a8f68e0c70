"""What an install does when something is missing, broken or old."""

from __future__ import annotations

import json
import sysconfig
import zipfile

import pytest

from tests.install.conftest import call_hook, copy_tree, install

NO_COMPILER = {
    "nothing on PATH": {"PATH": "/nonexistent"},
    "CXX names nothing": {"CXX": "no-such-compiler"},
    "CXX does not compile": {"CXX": "false"},
}


@pytest.fixture(scope="module")
def plain_tree(tree, tmp_path_factory):
    """A copy in which nothing was built."""
    return copy_tree(tree, tmp_path_factory.mktemp("plain") / "tree")


def record_of(wheel):
    with zipfile.ZipFile(wheel) as archive:
        assert [name for name in archive.namelist() if name.endswith(".so")] == []
        return json.loads(archive.read("msdkern/_build.json"))


@pytest.mark.parametrize("variables", NO_COMPILER.values(), ids=NO_COMPILER)
def test_without_a_compiler_the_python_part_installs(build_python, plain_tree, tmp_path, variables):
    done, wheel = call_hook(build_python, "build_wheel", plain_tree, tmp_path, **variables)
    assert done.returncode == 0, done.stdout
    missing = record_of(wheel)["missing"]
    reason = missing["_cpu"]
    assert variables.get("CXX", "c++, g++, clang++") in reason
    assert missing["_cuda"] == reason
    assert [line for line in done.stdout.splitlines() if "msdkern: _cpu: " in line] == [
        f"msdkern: _cpu: {reason}"
    ]


def test_doctor_names_the_reason(build_python, plain_tree, tmp_path):
    done, wheel = call_hook(
        build_python, "build_wheel", plain_tree, tmp_path / "dist", PATH="/nonexistent"
    )
    assert done.returncode == 0, done.stdout
    installed = install(wheel, tmp_path / "venv")
    text = installed.doctor()
    assert "absent: no compiler found (looked for c++, g++, clang++)" in text
    assert "eager     ok" in text


def test_a_compile_error_is_loud(build_python, tree, tmp_path):
    broken = copy_tree(tree, tmp_path / "tree")
    for source in [*broken.glob("csrc/*.cpp"), *broken.glob("csrc/cpu/*.cpp")]:
        source.write_text("#error broken on purpose\n" + source.read_text())
    done, wheel = call_hook(
        build_python, "build_wheel", broken, tmp_path / "dist", MSDKERN_CUDA="off"
    )
    assert done.returncode != 0
    assert wheel is None
    assert "broken on purpose" in done.stdout
    assert "msdkern: the native build failed; its words are above" in done.stdout


REFUSALS = {
    "on without nvcc": (
        {"MSDKERN_CUDA": "on", "CUDACXX": "no-such-nvcc"},
        "msdkern: MSDKERN_CUDA=on, but no compiler found (looked for no-such-nvcc); "
        "install the CUDA toolkit, set CUDACXX to its nvcc, or choose MSDKERN_CUDA=auto",
    ),
    "unknown word": (
        {"MSDKERN_CUDA": "yes"},
        "msdkern: MSDKERN_CUDA must be auto, on or off; got 'yes'",
    ),
}


@pytest.mark.parametrize(("variables", "sentence"), REFUSALS.values(), ids=REFUSALS)
def test_refuses(build_python, plain_tree, tmp_path, variables, sentence):
    done, wheel = call_hook(build_python, "build_wheel", plain_tree, tmp_path, **variables)
    assert done.returncode != 0
    assert wheel is None
    assert sentence in done.stdout.splitlines()


def test_editable_install_notices_changed_sources(build_python, wheel, tree, tmp_path):
    # In the tree where the wheel was built, so that nothing is compiled again.
    done, editable = call_hook(
        build_python, "build_editable", tree, tmp_path / "dist", MSDKERN_ARCHS="90"
    )
    assert done.returncode == 0, done.stdout
    installed = install(editable, tmp_path / "venv")
    where = installed.ask("import msdkern._cpu, msdkern.bench; print(msdkern.bench.__file__)")
    assert where == str(tree / "bench" / "__init__.py")
    assert "STALE" not in installed.doctor()
    source = tree / "csrc" / "bind.cpp"
    before = source.read_text()
    source.write_text(before + "// changed\n")
    try:
        assert "STALE: csrc changed since" in installed.doctor()
    finally:
        source.write_text(before)


def test_an_older_build_is_not_kept(build_python, tree, tmp_path):
    """Modules of an earlier install must not pass for a later one that could not build them."""
    copy = copy_tree(tree, tmp_path / "tree")
    old = copy / "msdkern" / f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
    old.write_bytes(b"an older build")
    done, _ = call_hook(build_python, "build_editable", copy, tmp_path / "dist", CXX="none")
    assert done.returncode == 0, done.stdout
    assert not old.exists()

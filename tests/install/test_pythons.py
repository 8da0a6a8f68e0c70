"""The same sources as a module of every Python on this computer; no PyTorch, no numpy."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.install.conftest import checked

PROBE = """
import json, pathlib, sys, sysconfig
header = pathlib.Path(sysconfig.get_path("include"), "Python.h")
print(json.dumps([sys.version_info[:2], header.exists(), sys.executable]))
"""


def usable(candidate):
    """(major, minor) and path of a Python >= 3.10 that can build modules, or None."""
    done = subprocess.run([candidate, "-c", PROBE], capture_output=True, text=True, check=False)
    if done.returncode:  # a launcher for a version that is not installed
        return None
    version, header, path = json.loads(done.stdout)
    return (tuple(version), path) if header and version >= [3, 10] else None


def pythons():
    """One interpreter for each version found; this one always."""
    names = [f"python3.{minor}" for minor in range(10, 16)]
    candidates = [path for name in names if (path := shutil.which(name))]
    candidates += sorted(map(str, Path.home().glob(".pyenv/versions/3.1?.*/bin/python3")))
    found = dict(filter(None, map(usable, candidates)))
    found[sys.version_info[:2]] = sys.executable
    return [pytest.param(path, id=f"{a}.{b}") for (a, b), path in sorted(found.items())]


@pytest.mark.parametrize("python", pythons())
def test_module_loads(build_python, wheel, tree, tmp_path, python):
    package = tmp_path / "msdkern"
    package.mkdir()
    shutil.copy2(tree / "msdkern" / "__init__.py", package)
    # In the wheel's own build folder, where only the binding depends on the Python.
    (build,) = (path.parent for path in (tree / "build").glob("*/CMakeCache.txt"))
    cmake = build_python.parent / "cmake"
    settings = {"Python_EXECUTABLE": python, "MSDKERN_OUTPUT": package}
    defines = [f"-D{name}={value}" for name, value in settings.items()]
    checked([cmake, "-U*Python*", "-UPYTHON*", *defines, build], cwd=tmp_path)
    checked([cmake, "--build", build, "--target", "_cpu"], cwd=tmp_path)
    program = "import sys; from msdkern import _cpu; print(_cpu.isas()[-1], 'numpy' in sys.modules)"
    said = checked([python, "-c", program], cwd=tmp_path, PYTHONPATH=tmp_path)
    assert said.split() == ["baseline", "False"]

# SPDX-License-Identifier: Apache-2.0
"""Builds the native modules with CMake and ninja; imports no PyTorch.

MSDKERN_CUDA=auto|on|off  the CUDA kernels: if nvcc works, or fail without it, or never.
MSDKERN_ARCHS="80;90"     GPU architectures.   CXX, CUDACXX, CMAKE_ARGS  as CMake knows them.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
TAG = sys.implementation.cache_tag
TRIAL = "int main() { if constexpr (sizeof(int) > 0) return 0; }"
HOST_TRIAL = f"#include <Python.h>\n#ifndef __GNUC__\n#error not GCC or Clang\n#endif\n{TRIAL}"
NVCC = os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "nvcc")


def find_compiler(variable, names, flags, suffix, source):
    """A compiler's command line and None, or None and why there is none that works."""
    names = [os.environ[variable]] if os.environ.get(variable) else names
    command = next((w for w in map(shlex.split, names) if shutil.which(w[0])), None)
    if command is None:
        return None, f"no compiler found (looked for {', '.join(names)})"
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, f"trial{suffix}").write_text(source)
        trial = [*command, *flags, "-shared", f"trial{suffix}", "-o", "trial.so"]
        done = subprocess.run(trial, cwd=folder, text=True, capture_output=True)
    lines = (done.stderr + done.stdout).splitlines() or [f"exit status {done.returncode}"]
    why = next((line for line in lines if "error" in line), lines[-1]).strip()
    return command, f"{names[0]} cannot build: {why}" if done.returncode else None


def find_compilers():
    """Command lines of the C++ and the CUDA compiler, and why each part must be left out."""
    asked = os.environ.get("MSDKERN_CUDA", "auto")
    if asked not in ("auto", "on", "off"):
        raise SystemExit(f"msdkern: MSDKERN_CUDA must be auto, on or off; got {asked!r}")
    flags = ["-std=c++17", "-fPIC", "-I" + sysconfig.get_path("include")]
    cxx, cpu = find_compiler("CXX", ["c++", "g++", "clang++"], flags, ".cpp", HOST_TRIAL)
    cpu = "the kernels need GCC or Clang, not MSVC" if sys.platform == "win32" else cpu
    nvcc, cuda = None, "left out by MSDKERN_CUDA=off"
    if asked != "off":
        nvcc, cuda = find_compiler("CUDACXX", ["nvcc", NVCC], ["-std=c++17"], ".cu", TRIAL)
    if asked == "on" and (cpu or cuda):
        fix = "install the CUDA toolkit, set CUDACXX to its nvcc, or choose MSDKERN_CUDA=auto"
        raise SystemExit(f"msdkern: MSDKERN_CUDA=on, but {cpu or cuda}; {fix}")
    return cxx, nvcc, {"_cpu": cpu, "_cuda": cpu or cuda}


class CMakeBuild(build_ext):
    """One CMake run builds every module; what is left out is recorded with its reason."""

    def run(self):
        cxx, nvcc, missing = find_compilers()
        for module, why in missing.items():
            print(f"msdkern: {module}: {why or 'building'}", file=sys.stderr)
        self.work = ROOT / "build" / TAG
        built = {} if missing["_cpu"] else self.cmake(cxx, None if missing["_cuda"] else nvcc)
        record = json.dumps({**built, "python": TAG, "missing": missing}, indent=1)
        for folder in [Path(self.build_lib), *([ROOT] if self.inplace else [])]:
            for ext in self.extensions:  # an older build must not pass for this one
                (folder / self.get_ext_filename(ext.name)).unlink(missing_ok=True)
            (folder / "msdkern").mkdir(parents=True, exist_ok=True)
            (folder / "msdkern" / "_build.json").write_text(record + "\n")
        self.extensions = [e for e in self.extensions if not missing[e.name.split(".")[1]]]
        super().run()

    def cmake(self, cxx, nvcc):
        import pybind11

        path = os.pathsep.join([os.environ["PATH"], sysconfig.get_path("scripts")])
        env = {**os.environ, "PATH": path, "CXX": shlex.join(cxx)}
        define = {"Python_EXECUTABLE": sys.executable, "pybind11_DIR": pybind11.get_cmake_dir()}
        define |= {"MSDKERN_OUTPUT": self.work / "out", "MSDKERN_CUDA": "ON" if nvcc else "OFF"}
        define |= {"CMAKE_CUDA_COMPILER": shutil.which(nvcc[0])} if nvcc else {}
        archs = os.environ.get("MSDKERN_ARCHS")
        define |= {"MSDKERN_ARCHS": archs} if archs else {}
        tool = shutil.which("cmake", path=path)
        if tool is None:
            raise SystemExit("msdkern: no cmake; fix: pip install cmake ninja pybind11")
        configure = [tool, "-S", ROOT, "-B", self.work, "-G", "Ninja", "-U*Python*", "-UPYTHON*"]
        configure += [f"-D{name}={value}" for name, value in define.items()]
        configure += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        settings, note = f"{env['CXX']} {configure}", self.work / "settings.txt"
        if not note.exists() or note.read_text() != settings:  # CMake's cache is of other settings
            shutil.rmtree(self.work, ignore_errors=True)
            self.work.mkdir(parents=True)
            note.write_text(settings)
        for command in (configure, [tool, "--build", self.work]):
            if subprocess.run(command, env=env).returncode:
                fix = "its words are above (CXX=none would leave the native modules out)"
                raise SystemExit(f"msdkern: the native build failed; {fix}")
        return json.loads((self.work / "build.json").read_text())

    def build_extension(self, ext):
        (module,) = (self.work / "out").glob(ext.name.split(".")[1] + ".*")
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(module, target)


setup(
    packages=[*find_packages(include=["msdkern", "msdkern.*"]), "msdkern.bench"],
    package_dir={"msdkern": "msdkern", "msdkern.bench": "bench"},
    package_data={"msdkern": ["py.typed"]},
    ext_modules=[Extension(f"msdkern.{name}", []) for name in ("_cpu", "_cuda")],
    cmdclass={"build_ext": CMakeBuild},
)

# SPDX-License-Identifier: Apache-2.0
"""`msdkern doctor`: what works on this computer, and why the rest does not.

Everything is gathered first (`examine`, plain data, also printed by `--json`) and worded after.
No hostname and no path of the user's is shown, so that the whole text can go into a bug report.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import platform
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from msdkern import _source

# Builds of PyTorch for other GPUs bring Triton under another name.
TRITON = ("triton", "pytorch-triton", "pytorch-triton-rocm", "pytorch-triton-xpu")
MODULES = ("_cpu", "_cuda")
TOLERANCE = 1e-6  # relative to max(1, |truth|); float32 rounds at 6e-8
REBUILD = "that mended, install again with pip's --force-reinstall --no-deps --no-cache-dir"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")


def run(args: argparse.Namespace) -> int:
    """Print the report; 0 when the plain PyTorch executor computes correctly, else 1."""
    facts = examine()
    text = json.dumps(facts) if args.json else "\n".join(words(facts))
    print(text.replace(str(Path.home()), "~"))
    return 0 if facts["self_test"].get("eager", {}).get("ok") else 1


def examine() -> dict[str, Any]:
    """All facts as plain data."""
    record = build_record()
    modules = {name: native_module(name, record) for name in MODULES}
    return {
        "versions": versions(),
        "build": record,
        "modules": modules,
        "cpu": cpu_facts(),
        "cuda": cuda_facts(),
        "executors": executor_table(),
        "order": executor_order(),
        "self_test": self_tests(),
        "extras": extras(),
    }


# --- facts ----------------------------------------------------------------------------------


def installed(name: str) -> str | None:
    """A distribution's version, without importing it."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    import msdkern

    return {
        "msdkern": msdkern.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "torch": installed("torch"),
        "numpy": installed("numpy"),
        "triton": next((version for name in TRITON if (version := installed(name))), None),
    }


def build_record(folder: Path = Path(__file__).parent) -> dict[str, Any]:
    """What setup.py wrote beside the package: compiler, flags, parts, and reasons."""
    try:
        return json.loads((folder / "_build.json").read_text())
    except (OSError, ValueError):
        why = "the package was never installed here"
        return {"missing": dict.fromkeys(MODULES, why)}


def native_module(name: str, record: dict[str, Any]) -> dict[str, Any]:
    """Whether the module loads, else why not; and whether its sources changed since."""
    try:
        module = importlib.import_module(f"msdkern.{name}")
    except ImportError as error:
        why = record.get("missing", {}).get(name)
        if why is None and record.get("python") != sys.implementation.cache_tag:
            why = f"built for {record.get('python')}, not for {sys.implementation.cache_tag}"
        return {"reason": why or str(error), "stale": False}
    stale = _source.present() and module.source_hash != _source.source_hash()
    return {"reason": None, "stale": stale, "source_hash": module.source_hash}


def cpu_facts() -> dict[str, Any]:
    """Instruction sets this processor can use, the one in use first."""
    try:
        module = importlib.import_module("msdkern._cpu")
    except ImportError:
        return {}
    isas = list(module.isas())
    return {"isas": isas, "chosen": isas[0], "openmp": module.openmp}


def cuda_facts() -> dict[str, Any]:
    """What the CUDA module carries, and each GPU with whether that code can run on it."""
    try:
        return importlib.import_module("msdkern._cuda").device_report()
    except ImportError:
        return {}


def executor_table() -> dict[str, dict[str, str | None]]:
    from msdkern import executors

    return executors.table()


def executor_order() -> list[str]:
    """Who is first for which losses, where several executors serve a device."""
    from msdkern import executors

    return executors.shapes()


def sample(dtype: Any, device: str) -> tuple[Any, Any]:
    """Five exits, 64 rows, 100 classes: the same numbers whatever dtype and device."""
    import torch

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 64, 100, generator=generator).mul(3).to(device, dtype)
    target = torch.randint(100, (64,), generator=generator).to(device)
    return logits.requires_grad_(), target


def loss_and_gradient(executor: str, dtype: Any, device: str) -> Any:
    """One float64 vector: the loss, then its gradient."""
    import torch

    import msdkern

    logits, target = sample(dtype, device)
    with msdkern.executor(executor):
        loss = msdkern.multi_exit_loss(
            list(logits.unbind()), target, pair_weight="mutual", temperature=3.0
        ).loss
        loss.backward()
    parts = [loss.detach().reshape(1), logits.grad.reshape(-1)]
    return torch.cat([part.double().cpu() for part in parts])


def self_test(executor: str, device: str) -> dict[str, Any]:
    """Largest error, relative to max(1, |truth|), of a float32 loss and its gradient."""
    import torch

    # float64 rounds the same float32 logits, so that only the computing differs.
    truth = loss_and_gradient("eager", torch.float64, "cpu")
    error = (loss_and_gradient(executor, torch.float32, device) - truth).abs()
    error = (error / truth.abs().clamp(min=1.0)).max().item()
    return {"device": device, "max_error": error, "ok": error <= TOLERANCE}


def self_tests() -> dict[str, dict[str, Any]]:
    """One test for each executor that says it is available."""
    from msdkern import executors

    results: dict[str, dict[str, Any]] = {}
    for name, reason in executors.table()["multi_exit_loss"].items():
        if reason is not None:
            continue
        device = executors.device_type(name) or "cpu"
        try:
            results[name] = self_test(name, device)
        except Exception as error:  # a doctor reports what it meets
            text = f"{type(error).__name__}: {error}".splitlines()[0]
            results[name] = {"device": device, "max_error": None, "ok": False, "reason": text}
    return results


def extras() -> dict[str, dict[str, Any]]:
    """Optional packages by extra: those missing, and the command that brings them."""
    try:
        requirements = importlib.metadata.requires("msdkern") or []
    except importlib.metadata.PackageNotFoundError:
        requirements = []
    found: dict[str, dict[str, Any]] = {}
    for requirement in requirements:
        match = re.match(r"([\w.-]+).*\bextra == ['\"](\w+)['\"]", requirement)
        elsewhere = "sys_platform" in requirement and sys.platform not in requirement
        if match is None or match[1] == "msdkern" or elsewhere:
            continue
        entry = found.setdefault(match[2], {"missing": [], "install": None})
        if installed(match[1]) is None:
            entry["missing"].append(match[1])
            entry["install"] = f'pip install "msdkern[{match[2]}]"'
    return found


# --- words ----------------------------------------------------------------------------------


def words(facts: dict[str, Any]) -> Iterator[str]:
    """The report as lines of text."""
    for title, section in SECTIONS.items():
        yield title
        for line in section(facts):
            yield f"  {line}"


def version_lines(facts: dict[str, Any]) -> Iterator[str]:
    for name, version in facts["versions"].items():
        yield f"{name:<10}{version or 'not installed'}"


def module_lines(facts: dict[str, Any]) -> Iterator[str]:
    build = facts["build"]
    for name, module in facts["modules"].items():
        if module["reason"]:
            yield f"{name:<10}absent: {module['reason']}"
            continue
        compiler = f"nvcc {build.get('nvcc')}" if name == "_cuda" else build.get("compiler")
        yield f"{name:<10}built with {compiler}, sources {module['source_hash'][:12]}"
        if module["stale"]:
            yield f"{'':<10}STALE: csrc changed since; build again: pip install -e ."
    if facts["modules"]["_cpu"]["reason"] is not None:
        yield f"{'':<10}{REBUILD}"


def cpu_lines(facts: dict[str, Any]) -> Iterator[str]:
    cpu = facts["cpu"]
    if not cpu:
        yield "no C++ kernels; plain PyTorch computes"
        return
    yield f"uses {cpu['chosen']} (this processor can: {', '.join(cpu['isas'])})"
    yield "OpenMP: " + ("yes" if cpu["openmp"] else "no, one thread computes")


def cuda_version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def cuda_lines(facts: dict[str, Any]) -> Iterator[str]:
    cuda = facts["cuda"]
    if not cuda:
        yield "no CUDA module"
        return
    archs = ", ".join(f"sm_{arch}" for arch in cuda["architectures"])
    yield f"compiled for {archs}; runtime {cuda_version(cuda['runtime'])}"
    driver = f", driver serves CUDA {cuda_version(cuda['driver'])}" if cuda["driver"] else ""
    yield f"{cuda['status']}{driver}"
    for device in cuda["devices"]:
        major, minor = device["capability"]
        memory = device["memory"] / 2**30
        runs = f"runs our sm_{device['binary']} code" if device["binary"] else device["status"]
        yield f"{device['name']}, sm_{major}{minor}, {memory:.0f} GiB: {runs}"


def executor_lines(facts: dict[str, Any]) -> Iterator[str]:
    for op, cells in facts["executors"].items():
        marks = [name for name, reason in cells.items() if reason is None]
        yield f"{op:<24}{', '.join(marks) or 'nothing'}"
    reasons = {(n, why) for cells in facts["executors"].values() for n, why in cells.items() if why}
    for name, why in sorted(reasons):
        yield f"{name}: {why}"
    yield from facts["order"]


def self_test_lines(facts: dict[str, Any]) -> Iterator[str]:
    for name, result in facts["self_test"].items():
        error = result["max_error"]
        detail = result.get("reason") or f"largest relative error against float64: {error:.1e}"
        yield f"{name:<10}{'ok' if result['ok'] else 'FAILED'} on {result['device']}, {detail}"


def extra_lines(facts: dict[str, Any]) -> Iterator[str]:
    for name, extra in facts["extras"].items():
        lacks = f"lacks {', '.join(extra['missing'])}: {extra['install']}"
        yield f"{name:<10}{lacks if extra['missing'] else 'complete'}"


SECTIONS: dict[str, Callable[[dict[str, Any]], Iterator[str]]] = {
    "Versions": version_lines,
    "Native modules": module_lines,
    "CPU": cpu_lines,
    "GPU": cuda_lines,
    "Executors": executor_lines,
    "Self-test": self_test_lines,
    "Extras": extra_lines,
}

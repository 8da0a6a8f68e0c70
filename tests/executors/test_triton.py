# SPDX-License-Identifier: Apache-2.0
"""Executor `triton` without a GPU: its reasons, its table, and its kernels in Triton's interpreter.

The interpreter is chosen by an environment variable for a whole process, hence a process of its
own: nothing of it reaches the other tests.
"""

from __future__ import annotations

import importlib
import itertools
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from msdkern import executors
from msdkern.executors import triton as ours
from msdkern.executors.triton import table

ROOT = Path(__file__).resolve().parents[2]
# Tests in this folder, and those of the ops on this executor alone.
INTERPRETED = {
    "losses": ("tests/executors/triton_interpreted.py",),
    "gates": ("tests/executors/triton_gates_interpreted.py", "tests/ops/test_gate.py",
              "tests/ops/test_gate_errors.py", "tests/ops/test_compact.py"),
}  # fmt: skip
interpreting = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="this process interprets"
)


@interpreting
@pytest.mark.parametrize("family", INTERPRETED)
def test_the_kernels_in_the_interpreter(family):
    pytest.importorskip("triton")
    # One thread: rows of a few numbers, for which others would only be woken.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "MSDKERN_TEST_DEVICE": "cpu",
                   "MSDKERN_TEST_SERVERS": "triton", "OMP_NUM_THREADS": "1"}  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-x", "-p", "tests.executors.interpreter"]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning",
         "-k", "not threads", *INTERPRETED[family]],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]
    assert "TRITON_INTERPRET" not in os.environ


@interpreting
def test_probing_imports_no_kernel_and_finds_a_sentence():
    program = """
import sys, msdkern
why = msdkern.executors.reason("triton")
kernels = [m for m in sys.modules if m.startswith("msdkern.executors.triton.")]
assert not kernels, kernels
print(why)
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "warnings that a user would see"
    assert done.stdout.strip() == str(executors.reason("triton"))


@pytest.fixture
def fresh():
    ours.reason.cache_clear()
    yield
    ours.reason.cache_clear()


def test_without_triton(fresh, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert str(ours.reason()).startswith("Triton cannot be imported (")


def test_an_old_triton(fresh, monkeypatch):
    old = types.ModuleType("triton")
    old.__version__ = "3.5.1"
    monkeypatch.setitem(sys.modules, "triton", old)
    assert ours.reason() == "Triton 3.6 or newer is needed; this is 3.5.1"


@pytest.mark.parametrize("version", ["3.6.0", "3.10.0", "4.0", "3.8.0+rocm7", "3.7.1.post2"])
@interpreting
def test_without_a_gpu(version, fresh, monkeypatch):
    new = types.ModuleType("triton")
    new.__version__ = version
    monkeypatch.setitem(sys.modules, "triton", new)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert ours.reason() == f"Triton {version} is there, but PyTorch finds no GPU"
    ours.reason.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert ours.reason() == "Triton's kernels need compute capability 8.0; this GPU has 7.5"
    ours.reason.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert ours.reason() is None


@interpreting
def test_it_serves_gpus_before_eager():
    assert executors.device_type("triton") == "cuda"
    assert executors.device_type("eager") is None
    order = executors.PREFERENCE["cuda"]
    assert order.index("triton") < order.index("eager")


def test_the_package_of_that_name_hides_no_triton():
    real = pytest.importorskip("triton")
    assert importlib.import_module("triton") is real
    assert not hasattr(ours, "jit")


@pytest.mark.parametrize("kind", ["direct", "general"])
@pytest.mark.parametrize("double", [False, True])
def test_every_shape_has_a_plan(kind, double):
    for exits in (*range(1, 33), 64):
        for classes in (1, 2, 3, 10, 100, 1000, 1024, 4096, 4097, 32000, 128256, 262144):
            for vector in (1, 4, 8):
                plan = table.loss_plan(exits, classes, vector, kind, double)
                assert plan.block & (plan.block - 1) == plan.rows & (plan.rows - 1) == 0
                assert plan.warps in (1, 2, 4, 8, 16)
                assert not plan.resident or plan.block >= classes
                assert plan.block <= max(vector, table.power_of_two(classes))
    rows = [table.row_plan(c, double) for c in (1, 5, 4096, 8193, 262144)]
    assert [p.resident for p in rows] == [True, True, True, False, False]


@pytest.mark.parametrize("size", [2, 4, 8])
def test_every_gate_and_many_exits_have_a_plan(size):
    for classes in (1, 2, 3, 10, 100, 1000, 1024, 4096, 4097, 32000, 128256, 262144):
        plan = table.gate_plan(classes, size)
        assert plan.block & (plan.block - 1) == plan.rows & (plan.rows - 1) == 0
        assert plan.resident == (plan.block >= classes)
        each = plan.rows * plan.block * plan.tiles // (32 * plan.warps)
        assert 4 <= each <= 16
        for exits, way in itertools.product((9, 17, 32, 33), table.STACKED):
            plan = table.stacked_plan(exits, classes, way, size == 8)
            assert plan.rows == 1
            assert plan.block >= 1
            assert plan.warps in (1, 2, 4, 8)
            assert plan.block <= table.power_of_two(classes)


def test_what_registers_do_not_hold_is_stacked_where_classes_are_few():
    held = ("direct", "by exits", False)
    assert not table.stacks(12, 10, 2, *held)
    assert table.stacks(13, 10, 2, *held)
    assert not table.stacks(13, 1000, 4, *held)
    assert not table.stacks(7, 10, 2, "general", "by pairs", False)
    assert table.stacks(8, 10, 2, "general", "by pairs", False)
    assert not table.stacks(5, 32000, 4, "general", "by pairs", False)
    assert table.stacks(6, 32000, 4, "general", "by pairs", False)


def test_common_shapes_stay_in_registers():
    for exits, classes in ((5, 10), (5, 100), (7, 1000), (12, 2), (4, 1000), (2, 4096)):
        assert table.loss_plan(exits, classes, 4, "direct", False).resident

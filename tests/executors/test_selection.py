# SPDX-License-Identifier: Apache-2.0
"""Who computes: the choice, its reasons, and that a forced choice never falls back."""

import subprocess
import sys

import pytest
import torch

import msdkern
from msdkern import executors
from msdkern.executors import cuda, native

OPS = ("multi_exit_loss", "multi_exit_row_losses", "multi_exit_softmax", "exit_statistics")
GATES = ("exit_gate", "gate_step", "compact_rows", "scatter_rows")


@pytest.fixture
def without_native(monkeypatch):
    """As if `_cpu` had not been built."""
    sentence = "the native module msdkern._cpu is not there (No module named 'msdkern._cpu')"
    monkeypatch.setattr(native, "_load", lambda: (None, sentence))
    for cached in (executors.reason, executors._decide):
        cached.cache_clear()
    yield sentence
    monkeypatch.undo()
    for cached in (executors.reason, executors._decide):
        cached.cache_clear()


def exits():
    return [torch.zeros(2, 3) for _ in range(2)]


def test_unknown_name():
    sentence = "^executor: name must be one of eager, cpu, cuda, triton; got 'gpu'$"
    with pytest.raises(ValueError, match=sentence), msdkern.executor("gpu"):
        pass


def test_the_choice_ends_with_the_block_also_after_an_error():
    before = executors.select("exit_statistics", "cpu")

    @msdkern.executor("eager")
    def fail():
        raise KeyError(executors.select("exit_statistics", "cpu"))

    with pytest.raises(KeyError, match="eager"):
        fail()
    assert executors.select("exit_statistics", "cpu") == before


def test_choices_nest():
    with msdkern.executor("eager"):
        with msdkern.executor("cpu"):
            assert executors._forced == "cpu"
        assert executors.select("exit_statistics", "cpu") == "eager"


def test_another_device_is_served_by_eager():
    assert executors.select("multi_exit_loss", "meta") == "eager"


def test_a_forced_executor_refuses_another_device():
    z = [torch.zeros(2, 3, device="meta")]
    with msdkern.executor("cpu"), pytest.raises(RuntimeError) as caught:
        msdkern.exit_statistics(z)
    assert str(caught.value) == (
        "exit_statistics: the executor that was asked for cannot serve; "
        "executor 'cpu' serves cpu tensors; got meta"
    )


def test_without_the_native_module_eager_serves(without_native):
    assert executors.select("multi_exit_loss", "cpu") == "eager"
    assert msdkern.multi_exit_loss(exits(), pair_weight="mutual").loss == 0


@pytest.mark.parametrize("op", OPS)
def test_without_the_native_module_a_forced_choice_raises(op, without_native):
    with msdkern.executor("cpu"), pytest.raises(RuntimeError) as caught:
        getattr(msdkern, op)(exits())
    rule = f"{op}: the executor that was asked for cannot serve"
    assert str(caught.value) == f"{rule}; {without_native}"


def test_an_op_that_an_executor_lacks_is_served_by_the_next(monkeypatch):
    monkeypatch.delattr(native, "gate_step", raising=False)
    executors._decide.cache_clear()
    try:
        assert executors.select("gate_step", "cpu") == "eager"
        assert msdkern.gate_step(torch.zeros(2, 3), 0.5).count == 2
        with (
            msdkern.executor("cpu"),
            pytest.raises(RuntimeError, match="cannot serve; "),
        ):
            msdkern.gate_step(torch.zeros(2, 3), 0.5)
    finally:
        executors._decide.cache_clear()


def test_the_executor_of_forward_serves_backward():
    z = [x.requires_grad_() for x in exits()]
    with msdkern.executor("eager"):
        loss = msdkern.multi_exit_row_losses(z, torch.zeros(2, dtype=torch.int64)).cross_entropy
    seen = []
    kept = executors.implementation
    try:
        executors.implementation = lambda op, name: seen.append((op, name)) or kept(op, name)
        loss.sum().backward()
    finally:
        executors.implementation = kept
    assert seen == [("multi_exit_row_losses_backward", "eager")]


def test_the_table_and_its_text(without_native):
    gpu = {name: executors.reason(name) for name in ("cuda", "triton")}
    reasons = {"eager": None, "cpu": without_native, **gpu}
    table = executors.table()
    assert {op: table[op] for op in OPS} == dict.fromkeys(OPS, reasons)
    every = (*OPS, *GATES)
    assert {op: table[op]["cpu"] for op in every} == dict.fromkeys(every, without_native)
    lines = msdkern.explain().splitlines()
    assert lines[0].split() == ["op", *reasons]
    marks = ["available" if why is None else "no" for why in reasons.values()]
    assert [line.split() for line in lines[1:5]] == [[op, *marks] for op in OPS]
    assert lines[9:] == [f"{name}: {why}" for name, why in reasons.items() if why]


def test_explain_tells_of_a_forced_choice():
    with msdkern.executor("eager"):
        assert "executor 'eager' was asked for; nothing else will serve" in msdkern.explain()
    assert "was asked for" not in msdkern.explain()


DEVICE = {"name": "GPU", "status": "ok"}


@pytest.mark.parametrize(
    ("report", "words"),
    [
        ({"status": "no driver", "devices": []}, "CUDA says: no driver"),
        ({"status": "ok", "devices": [DEVICE]}, None),
        (
            {"status": "ok", "devices": [{"name": "GPU", "status": "no kernel image"}]},
            "no device runs the kernels that msdkern._cuda has (GPU: no kernel image)",
        ),
    ],
)
def test_why_cuda_cannot_serve(report, words):
    assert cuda._device_reason(report) == words


def test_cuda_needs_a_pytorch_with_cuda(monkeypatch):
    monkeypatch.setattr(cuda, "_load", lambda: (object(), None))
    monkeypatch.setattr(torch.version, "cuda", None)
    assert cuda.reason() == "this PyTorch is built without CUDA"


def test_a_module_of_another_abi_is_refused(monkeypatch):
    _cpu = pytest.importorskip("msdkern._cpu")
    monkeypatch.setattr(_cpu, "abi_version", 999)
    native._load.cache_clear()
    try:
        needed = f"this package needs {native.ABI_VERSION}: install again"
        assert native._load() == (None, f"msdkern._cpu has ABI version 999, {needed}")
    finally:
        native._load.cache_clear()


PROGRAM = """
import torch, msdkern
from msdkern import executors
try:
    msdkern.exit_statistics([torch.zeros(2, 3)])
    print(executors.select("exit_statistics", "cpu"))
except RuntimeError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("eager", "eager"),
        (
            "gpu",
            "exit_statistics: the executor that was asked for cannot serve; "
            "unknown executor 'gpu' (known: eager, cpu, cuda, triton)",
        ),
    ],
)
def test_the_environment_variable(value, words, settings):
    settings("MSDKERN_EXECUTOR", value)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == words

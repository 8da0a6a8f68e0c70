# SPDX-License-Identifier: Apache-2.0
"""How many registers a kernel may have: the rule, and that launches obey it."""

from __future__ import annotations

import types

import pytest
import torch

pytest.importorskip("triton")

from msdkern.executors.triton import launch, registers, table


@pytest.mark.parametrize(
    ("spilled_with", "threads", "resident", "tried"),
    [
        (128, 128, True, [128, 136, 144, 160, 192, 255]),
        (80, 256, True, [80, 88, 96, 112, 144, 255]),
        (240, 128, True, [240, 248, 255]),
        (255, 128, True, [255]),
        (112, 512, True, [112, 120, 128]),
        (64, 1024, True, [64]),
        (128, 256, False, [128]),
        (172, 256, False, [128]),
        (96, 256, False, [96]),
    ],
)
def test_what_is_tried(spilled_with, threads, resident, tried):
    assert registers.limits(spilled_with, threads, resident) == tried


class Assembler:
    """Spills as `spills` says, by limit."""

    def __init__(self, spills):
        self.spills, self.asked = spills, []

    def __call__(self, maxnreg=None):
        self.asked.append(maxnreg)
        spilled = self.spills.get(maxnreg, 0)
        return types.SimpleNamespace(n_regs=maxnreg or 128, n_spills=spilled)


@pytest.mark.parametrize(
    ("spills", "options", "asked"),
    [
        ({}, {}, [None]),
        ({None: 2}, {"maxnreg": 128}, [None, 128]),
        ({None: 2, 128: 28, 136: 4}, {"maxnreg": 144}, [None, 128, 136, 144]),
        # Not cured: whatever spills least, the assembler's own choice before others.
        (dict.fromkeys((None, 128, 136, 144, 160, 192, 255), 2), {}, None),
        ({None: 4, 128: 28, 136: 4, 144: 2, 160: 2, 192: 8, 255: 3}, {"maxnreg": 144}, None),
    ],
)
def test_the_first_limit_that_does_not_spill(spills, options, asked):
    assembler = Assembler(spills)
    found, binary = registers.spill_free(assembler, 128, True)
    assert found == options
    assert binary.n_spills == spills.get(options.get("maxnreg"), 0)
    assert assembler.asked == (asked or [None, 128, 136, 144, 160, 192, 255])


@pytest.mark.parametrize(
    ("alone", "together", "options"),
    [
        ((172, 0), (114, 0), {"maxnreg": 128}),
        ((172, 0), (128, 2), {}),
        ((128, 4), (128, 2), {"maxnreg": 128}),
        ((128, 0), None, {}),
    ],
)
def test_a_sweep_admits_another_program(alone, together, options):
    """(registers, spills), by itself and with a limit, of 8 warps."""

    def build(maxnreg=None):
        n_regs, n_spills = alone if maxnreg is None else together
        return types.SimpleNamespace(n_regs=n_regs, n_spills=n_spills)

    assert registers.spill_free(build, 256, False)[0] == options


def test_devices_that_take_a_limit(monkeypatch):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.version, "hip", None)
    assert registers.limited(gpu)
    assert not registers.limited(torch.device("cpu"))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert not registers.limited(gpu)


class Kernel:
    """In place of one of Triton's: records what it is compiled for, and launched with."""

    def __init__(self, spills):
        self.spills, self.compiled, self.launched = spills, [], []

    def warmup(self, *arguments, grid, num_warps, maxnreg=None, **constants):
        self.compiled.append(maxnreg)
        return Compiled(num_warps, self.spills.get(maxnreg, 0))

    def __getitem__(self, grid):
        def run(*arguments, maxnreg=None, **constants):
            self.launched.append(maxnreg)

        return run


class Compiled:
    def __init__(self, warps, spilled):
        self.warps, self.spilled = warps, spilled

    def _init_handles(self):
        self.n_regs, self.n_spills = 96, self.spilled


@pytest.fixture
def kernel(monkeypatch):
    fake = Kernel({None: 2, 96: 2})
    monkeypatch.setattr(launch, "loss_kernel", fake)
    monkeypatch.setattr(launch, "stacked_kernel", fake)
    monkeypatch.setattr(registers, "limited", lambda device: True)
    monkeypatch.setattr(registers, "_found", {})
    return fake


T = torch.tensor(2.0, dtype=torch.float64)


def call(exits=3, classes=10, rows=5, dtype=torch.float32, wanted=True, weight=None):
    z = [torch.zeros(rows, classes, dtype=dtype) for _ in range(exits)]
    y = torch.zeros(rows, dtype=torch.int64)
    launch.multi_exit_loss(
        z, [], y, None, "mutual", None, T, T, True, "forward_kl", 0.5, True, weight, -100, 0.0,
        "mean", None, False, [True] * (exits - 1) + [wanted],
    )  # fmt: skip


def test_a_launch_gets_the_limit_that_was_found_before_the_first(kernel):
    call()
    assert kernel.compiled == [None, 96, 104]
    assert kernel.launched == [104]
    call()
    call(rows=7)
    assert kernel.compiled == [None, 96, 104]
    assert kernel.launched == [104] * 3


@pytest.mark.parametrize(
    "other",
    [{"classes": 9}, {"exits": 2}, {"dtype": torch.bfloat16}, {"wanted": False},
     {"weight": torch.ones(10)}],
    ids=str,
)  # fmt: skip
def test_another_kernel_has_a_limit_of_its_own(kernel, other):
    call()
    kernel.spills = {}
    call(**other)
    assert kernel.compiled == [None, 96, 104, None]
    assert kernel.launched == [104, None]


def test_a_tensor_of_another_dtype_has_a_limit_of_its_own(kernel):
    call(weight=torch.ones(10))
    kernel.spills = {}
    call(weight=torch.ones(10, dtype=torch.float64))
    assert kernel.compiled == [None, 96, 104, None]


def test_another_device_has_a_limit_of_its_own(monkeypatch):
    monkeypatch.setattr(registers, "_found", {})
    found = [
        registers.options((torch.device("cuda", i), 1), Kernel(spills), (1,), (), {"num_warps": 4},
                          table.Plan(True, 1, 1, 4))
        for i, spills in ((0, {}), (1, {None: 2}), (0, {None: 2}))
    ]  # fmt: skip
    assert found == [{}, {"maxnreg": 96}, {}]


@pytest.mark.parametrize("shape", [{"classes": 5000, "exits": 2}, {"exits": 20}], ids=str)
@pytest.mark.parametrize(("cured", "limit"), [(True, 96), (False, None)])
def test_a_sweep_is_given_no_higher_limit(kernel, shape, cured, limit):
    kernel.spills = {None: 2, 96: 0 if cured else 2}
    call(**shape)
    assert kernel.compiled == [None, 96]
    assert kernel.launched == [limit]

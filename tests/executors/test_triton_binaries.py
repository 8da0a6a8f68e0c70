# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels compiled for GPUs that are not here: what the binaries say.

The default run compiles a few configurations; MSDKERN_ALL_BINARIES=1 all those that the table can
choose (hours). A process of its own is not needed: nothing is run.
"""

from __future__ import annotations

import itertools
import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted in this process", allow_module_level=True)

from msdkern.executors.triton import launch, table
from tests.executors import aot

EVERYTHING = os.environ.get("MSDKERN_ALL_BINARIES") == "1"
NVIDIA = ("sm_80", "sm_90", "sm_100")


def loss_launch(
    exits, classes, dtype=torch.float32, pairs="mutual", divergence="forward_kl", detach=True,
    gradient=True, rows=1024,
):  # fmt: skip
    """The launch of a mean loss over class indices."""
    z = [torch.empty(rows, classes, dtype=dtype, device="meta") for _ in range(exits)]
    y = torch.empty(rows, dtype=torch.int64, device="meta")
    weight = torch.empty(exits, exits, device="meta") if pairs == "dense" else None
    one, t = torch.tensor(1.0, dtype=torch.float64), torch.tensor(3.0, dtype=torch.float64)
    (found,) = aot.launches(
        launch.multi_exit_loss, z, [], y, None, pairs, weight, one, t, True, divergence, 0.5,
        detach, None, -100, 0.0, "mean", None, False, [gradient] * exits if gradient else [],
    )  # fmt: skip
    return found


def elements_per_thread(found):
    held = found.arguments["ROWS"] * found.arguments["BLOCK"]
    return held // (found.warps * 32)


NAMED = ("none", "mutual", "last", "deeper", "next")
# What `loss_launch` takes, and the target: row sets that are held in registers, those among them
# that came closest to the limit or went beyond it. The last two need a limit of their own
# (registers.py).
HELD = [
    ((7, 1000, torch.bfloat16, "mutual", "forward_kl"), "sm_90"),
    ((12, 2, torch.bfloat16, "mutual", "forward_kl"), "sm_90"),
    ((12, 10, torch.bfloat16, "mutual", "forward_kl"), "sm_100"),
    ((4, 10, torch.bfloat16, "mutual", "forward_kl"), "sm_100"),
    ((5, 100, torch.float32, "mutual", "forward_kl"), "sm_80"),
    ((3, 1000, torch.float16, "dense", "forward_kl"), "sm_90"),
    ((12, 10, torch.float16, "last", "forward_kl"), "gfx942"),
    ((3, 100, torch.float32, "mutual", "jsd"), "sm_100"),
    ((3, 32, torch.float32, "mutual", "forward_kl"), "sm_80"),
    ((4, 2048, torch.float32, "deeper", "forward_kl"), "sm_80"),
    ((4, 1000, torch.float32, "dense", "jsd"), "sm_90"),
    ((4, 1000, torch.float32, "dense", "jsd"), "sm_100"),
    ((7, 256, torch.float32, "dense", "jsd"), "sm_100"),
    ((7, 4, torch.float32, "dense", "jsd"), "sm_100"),
    ((3, 100, torch.float64, "mutual", "jsd", False), "sm_90"),
    ((4, 4, torch.float32, "dense", "jsd"), "sm_80"),
    ((3, 1000, torch.float32, "mutual", "reverse_kl"), "sm_100"),
]
LADDER = (2, 4, 10, 16, 32, 64, 100, 200, 512, 1000, 2048, 4096)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "soft_ce")
if EVERYTHING:
    ways = dict.fromkeys((
        *itertools.product(NAMED, ["forward_kl"], [True]),
        *itertools.product(["mutual", "dense"], DIVERGENCES, [True, False]),
    ))  # fmt: skip
    most = table.EXITS_APART["by exits"][0]
    sizes = itertools.product(range(1, most + 1), LADDER, DTYPES, ways, [True, False])
    kinds = [(k, c, dtype, *way, gradient) for k, c, dtype, way, gradient in sizes]
    HELD = list(itertools.product(kinds, aot.TARGETS))


@pytest.mark.parametrize(("case", "target"), HELD, ids=str)
def test_a_row_set_in_registers_does_not_spill(case, target):
    found = loss_launch(*case)
    if not found.arguments["RESIDENT"]:
        if not EVERYTHING:
            raise LookupError(f"{case} is no longer held in registers")
        pytest.skip("swept")
    binary = aot.examine(aot.build(found, target), target)
    assert binary.spilled == 0, binary
    if target != "gfx942":
        assert binary.registers * found.warps * 32 <= 65536


def test_a_limit_of_registers_changes_no_instruction():
    """What a limit decides comes after the code that says what is computed."""
    found = loss_launch(3, 100, divergence="jsd")
    free, limited = (
        aot.build(found, "sm_90", **limit).asm["ptx"].splitlines()
        for limit in ({}, {"maxnreg": 200})
    )
    assert ".maxnreg 200" in limited
    assert [x for x in limited if "maxnreg" not in x] == [x for x in free if "maxnreg" not in x]


def test_logarithms_do_not_branch():
    """A pair takes two of each of its elements: branches would grow with the pairs."""
    few, many = (
        aot.build(loss_launch(exits, 4, divergence="jsd"), "sm_90").asm["ptx"].count("bra")
        for exits in (2, 4)
    )
    assert few == many


@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize("case", [(5, 100, "mutual", "forward_kl"), (4, 32000, "last", "jsd")])
def test_it_compiles_for_every_target(case, target):
    exits, classes, pairs, divergence = case
    found = loss_launch(exits, classes, torch.bfloat16, pairs, divergence)
    binary = aot.examine(aot.build(found, target), target)
    assert 0 < binary.registers <= 512
    assert binary.spilled == 0 or not found.arguments["RESIDENT"], binary
    assert binary.spilled <= 64, "a sweep may park a few numbers, no more"


@pytest.mark.parametrize(
    ("exits", "classes", "dtype"),
    [(5, 100, torch.float32), (7, 1000, torch.float32), (7, 1000, torch.bfloat16)],
    ids=str,
)
def test_one_read_and_one_write(exits, classes, dtype):
    """Each element of the row set is loaded once and its gradient stored once, in whole vectors:
    the code is free of loops over classes, so counting instructions counts traffic."""
    found = loss_launch(exits, classes, dtype, rows=64)
    assert found.arguments["RESIDENT"]
    compiled = aot.build(found, "sm_90")
    element = dtype.itemsize
    vector = min(elements_per_thread(found), found.arguments["STEP"], 16 // element) * element
    assert vector >= 8
    expected = exits * elements_per_thread(found) * element
    for kind, sizes in aot.row_accesses(compiled.asm["ptx"], vector).items():
        assert set(sizes) == {vector}, kind
        assert sum(sizes) == expected, kind
    assert "ld.local" not in compiled.asm["ptx"]


def test_a_sweep_reads_twice_and_writes_once():
    found = loss_launch(4, 32000, torch.bfloat16)
    assert not found.arguments["RESIDENT"]
    touched = aot.row_accesses(aot.build(found, "sm_90").asm["ptx"], 16)
    once = 4 * elements_per_thread(found) * 2
    assert (sum(touched["ld"]), sum(touched["st"])) == (2 * once, once)


@pytest.mark.parametrize("case", [(32, 32000, "mutual"), (32, 100, "last"), (17, 1000, "next")])
def test_many_exits_are_an_axis(case):
    """The code, and what a thread holds, do not grow with the exits."""
    exits, classes, pairs = case
    found = loss_launch(exits, classes, torch.bfloat16, pairs)
    assert found.kernel.__name__ == "stacked_kernel"
    target = NVIDIA[exits % 3]
    binary = aot.examine(aot.build(found, target), target)
    assert binary.spilled == 0
    assert binary.registers <= 128


PAIRWISE = {
    "matrix": ("dense", "forward_kl", True),
    "true mutual": ("mutual", "jsd", False),
    "reverse matrix": ("dense", "reverse_kl", False),
}


@pytest.mark.parametrize("name", PAIRWISE)
def test_many_exits_meet_pair_by_pair_in_a_loop(name):
    """Where the work is O(K^2), the code is not."""
    pairs, divergence, detach = PAIRWISE[name]
    target = list(aot.TARGETS)[list(PAIRWISE).index(name)]
    found = loss_launch(32, 1000, torch.bfloat16, pairs, divergence, detach)
    assert found.kernel.__name__ == "stacked_kernel"
    compiled = aot.build(found, target)
    binary = aot.examine(compiled, target)
    assert binary.spilled <= 64, "a loop may park a few numbers, no more"
    assert binary.registers <= 128
    if "ptx" in compiled.asm:  # of 1024 pairs, each has an exponential in code that is unrolled
        assert compiled.asm["ptx"].count("ex2.approx") < 200


@pytest.mark.parametrize(
    "case",
    [(13, 10, torch.float32, "forward_kl"), (8, 10, torch.float32, "jsd"),
     (5, 10, torch.float64, "reverse_kl")],
    ids=str,
)  # fmt: skip
def test_few_classes_that_registers_do_not_hold(case):
    exits, classes, dtype, divergence = case
    found = loss_launch(exits, classes, dtype, "mutual", divergence)
    assert found.kernel.__name__ == "stacked_kernel"
    binary = aot.examine(aot.build(found, "sm_90"), "sm_90")
    assert binary.spilled <= 64, "a loop may park a few numbers, no more"


def metas(count, rows, classes, dtype=torch.float32):
    return [torch.empty(rows, classes, dtype=dtype, device="meta") for _ in range(count)]


T = torch.tensor(2.0, dtype=torch.float64)
OTHERS = {
    "softmax": (launch.multi_exit_softmax, lambda z: (z, T, False)),
    "log_softmax backward": (launch.multi_exit_softmax_backward, lambda z: (z, z, T, True)),
    "statistics": (launch.exit_statistics, lambda z: (z,)),
    "scale": (launch.scale_, lambda z: (z, torch.empty((), device="meta"))),
}


@pytest.mark.parametrize(("classes", "target"), [(1000, "sm_90"), (32000, "gfx942")])
@pytest.mark.parametrize("name", OTHERS)
def test_the_kernels_of_single_exits(name, classes, target):
    function, arguments = OTHERS[name]
    (found,) = aot.launches(function, *arguments(metas(5, 64, classes)))
    compiled = aot.build(found, target)
    assert aot.examine(compiled, target).spilled == 0
    if target == "sm_90":  # whole vectors, though the exit is chosen at run time
        assert set(aot.row_accesses(compiled.asm["ptx"], 8)["ld"]) == {16}


OPTIONS = {
    "probabilities": {"target": torch.empty(64, 100, device="meta")},
    "smooth": {"label_smoothing": 0.1, "class_weight": torch.empty(100, device="meta")},
    "per row": {"exit_weight": torch.empty(3, 64, device="meta"),
                "pair_weight": torch.empty(3, 4, 64, device="meta")},
    "matrix": {"pair_divergence": True},
    "reverse": {"pairs": "deeper", "divergence": "reverse_kl"},
    "true mutual": {"pairs": "mutual", "detach": False, "divergence": "soft_ce"},
}  # fmt: skip


@pytest.mark.parametrize("number", range(len(OPTIONS)), ids=list(OPTIONS))
def test_every_option_compiles(number):
    chosen, dtype = list(OPTIONS.values())[number], (torch.float16, torch.float64)[number % 2]
    label = torch.empty(64, dtype=torch.int64, device="meta")
    weight, divisor = chosen.get("pair_weight"), torch.empty((), device="meta")
    teachers = metas(1 if weight is not None else 0, 64, 100, dtype)
    pairs = "mutual" if weight is None else "dense"
    rows = (
        metas(3, 64, 100, dtype), teachers, chosen.get("target", label),
        chosen.get("exit_weight"), chosen.get("pairs", pairs), weight, divisor, divisor, True,
        chosen.get("divergence", "forward_kl"), 0.5, chosen.get("detach", True),
        chosen.get("class_weight"), -100, chosen.get("label_smoothing", 0.0),
    )  # fmt: skip
    up = torch.empty(3, 64, device="meta")
    scalar = (*rows, "sum", divisor, chosen.get("pair_divergence", False), [True, False, True])
    for function, arguments in (
        (launch.multi_exit_loss, scalar),
        (launch.multi_exit_row_losses, rows),
        (launch.multi_exit_row_losses_backward, (up, up, *rows, [True] * 3)),
    ):
        (found,) = aot.launches(function, *arguments)
        assert aot.examine(aot.build(found, "sm_90"), "sm_90").registers > 0


def test_labels_of_long_batches_are_counted_before():
    first, second = aot.launches(launch.multi_exit_loss, *long_batch())
    assert second.kernel is loss_launch(3, 10).kernel
    assert aot.examine(aot.build(first, "sm_90"), "sm_90").spilled == 0


def long_batch():
    rows = launch.LABELS_EACH + 1
    label = torch.empty(rows, dtype=torch.int64, device="meta")
    return (
        metas(3, rows, 10), [], label, None, "mutual", None, T, T, True, "forward_kl", 0.5, True,
        None, -100, 0.0, "mean", None, False, [True] * 3,
    )  # fmt: skip


def test_a_changed_number_compiles_nothing():
    """Temperature, scale and the number of rows are arguments of the kernel, not part of it."""
    names = [p.name for p in loss_launch(3, 10).kernel.params if p.is_constexpr]
    assert not {"temperature", "pair_scale", "normalizer", "rows", "smoothing"} & set(names)
    first, second = (loss_launch(3, 10, rows=n).arguments for n in (130, 1027))
    assert [first[n] for n in names] == [second[n] for n in names]


def test_products_and_sums_are_not_contracted():
    """x is rounded once, for its exponential and for l alike (see `launch.EXACT`): the only fused
    multiply-adds are those that the kernels ask for and those inside of the logarithm."""
    found = loss_launch(2, 100, pairs="last")
    exact, fused = (
        aot.build(found, "sm_90", enable_fp_fusion=on).asm["ptx"].count("\tfma.rn.f32")
        for on in (False, True)
    )
    assert not found.fusion
    assert exact < fused


def test_offsets_beyond_32_bits():
    """K N C = 4.2e9, and the stride of a row set times its number: products are 64-bit."""
    found = loss_launch(4, 128256, torch.bfloat16, rows=8192)
    ptx = aot.build(found, "sm_90").asm["ptx"]
    assert "mul.wide" in ptx or "mad.wide" in ptx or "mul.lo.s64" in ptx
    assert found.grid == (8192,)

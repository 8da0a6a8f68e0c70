# SPDX-License-Identifier: Apache-2.0
"""The gates of executor `triton` compiled for GPUs that are not here: what the binaries say."""

from __future__ import annotations

import itertools
import os
import re

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted in this process", allow_module_level=True)

from msdkern import reference
from msdkern.executors.triton import gate_launch
from tests.executors import aot

EVERYTHING = os.environ.get("MSDKERN_ALL_BINARIES") == "1"
ONE = torch.tensor(1.0, dtype=torch.float64)
SHORT, LONG = gate_launch.SPAN, gate_launch.SPAN + 1  # batches of one launch and of two


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def step_launches(classes, dtype, measure="confidence", rows=256):
    given = meta(rows) if measure == "score" else None
    before = (meta(rows, dtype=torch.int64), meta(rows)) if measure == "patience" else (None, None)
    live = meta(dtype=torch.int64)
    z = meta(rows, classes, dtype=dtype)
    return aot.launches(gate_launch.gate_step, z, ONE, measure, ONE, given, *before, live)


def gate_launch_of(classes, dtype, measure="confidence", exits=3, rows=256):
    z = [meta(rows, classes, dtype=dtype) for _ in range(exits)]
    given = meta(exits, rows) if measure == "score" else None
    return aot.launches(gate_launch.exit_gate, z, ONE, measure, ONE, given)


LAUNCHES = {"gate_step": step_launches, "exit_gate": gate_launch_of}
# (classes, dtype, measure): held rows of every number of warps, sweeps, rows of odd length.
CASES = [
    (2, torch.float32, "patience"),
    (10, torch.float32, "entropy"),
    (100, torch.float16, "score"),
    (1000, torch.bfloat16, "normalized_entropy"),
    (1001, torch.float64, "entropy"),
    (4096, torch.float32, "margin"),
    (32000, torch.bfloat16, "entropy"),
    (50257, torch.float32, "max_logit"),
    (262144, torch.float32, "margin"),
]
if EVERYTHING:
    CASES = list(
        itertools.product(
            (1, 2, 4, 10, 16, 32, 64, 100, 200, 512, 1000, 2048, 4096, 8192, 32000, 50257),
            (torch.float32, torch.bfloat16, torch.float16, torch.float64),
            reference.MEASURES,
        )
    )


@pytest.mark.parametrize("op", LAUNCHES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_nothing_spills(case, op):
    found = LAUNCHES[op](*case)
    targets = list(aot.TARGETS)
    here = CASES.index(case) + list(LAUNCHES).index(op)
    for target in targets if EVERYTHING else (targets[here % len(targets)],):
        for launch in found:
            binary = aot.examine(aot.build(launch, target), target)
            assert binary.spilled == 0, f"{target}: {binary}"
            assert binary.registers <= 128, f"{target}: {binary}"


@pytest.mark.parametrize("op", LAUNCHES)
@pytest.mark.parametrize(
    ("classes", "dtype"),
    [(100, torch.float32), (1000, torch.bfloat16), (4096, torch.float32), (32000, torch.bfloat16)],
    ids=str,
)
def test_one_read_in_whole_vectors(classes, dtype, op):
    """The instructions that load logits: once each element of a program's tile; a sweep has one
    tile more in its code, for rows without a softmax, where it looks for a NaN. They do not
    multiply with the exits, whose loop ends when all rows have left."""
    (found,) = LAUNCHES[op](classes, dtype)
    compiled, given = aot.build(found, "sm_90"), found.arguments
    tiles = 1 if given["RESIDENT"] else given["TILES"] + 1
    threads = 32 * found.warps
    expected = given["ROWS"] * given["BLOCK"] * tiles // threads * dtype.itemsize
    loads = aot.row_accesses(compiled.asm["ptx"], 16)["ld"]
    assert set(loads) == {16}
    assert sum(loads) == expected
    assert aot.row_accesses(compiled.asm["ptx"], 5)["ld"] == loads


@pytest.mark.parametrize("rows", [SHORT, LONG])
def test_programs_meet_in_integers_alone(rows):
    """What is added by atomics is the same in any order."""
    found = step_launches(10, torch.float32, rows=rows)
    assert len(found) == (1 if rows == SHORT else 2)
    kinds = []
    for launch in found:
        ptx = aot.build(launch, "sm_90").asm["ptx"]
        kinds += re.findall(r"\b(?:atom|red)\.\S+\.(\w+) ", ptx)
    assert kinds
    assert set(kinds) <= {"u32", "s32", "b32"}


def test_a_changed_number_compiles_nothing():
    """Rows, thresholds, temperatures and counts are arguments of the kernels, not part of them."""
    for op in LAUNCHES.values():
        first, *others = (op(100, torch.float32, rows=n)[0] for n in (1, 16, 100, 256))
        assert all(aot.describe(first) == aot.describe(other) for other in others)
    kinds = []
    for rows, tail, tensors in ((1, 1, 3), (16, 16, 4), (256, 40, 4)):
        x, index = [meta(rows, tail)] * tensors, meta(rows, dtype=torch.int64)
        (found,) = aot.launches(gate_launch.compact_rows, x, index, index[0], rows)
        kinds.append(aot.describe(found))
    assert kinds[0] == kinds[1] == kinds[2]


@pytest.mark.parametrize("target", aot.TARGETS)
def test_rows_are_copied_in_words_of_sixteen_bytes(target):
    x, index = [meta(64, 8), meta(64), meta(64, 3, dtype=torch.int8)], meta(64, dtype=torch.int64)
    for op in (
        lambda: gate_launch.compact_rows(x, index, None, 64),
        lambda: gate_launch.scatter_rows(x, x, index, None),
    ):
        (found,) = aot.launches(op)
        compiled = aot.build(found, target)
        binary = aot.examine(compiled, target)
        assert binary.spilled == 0
        assert binary.registers <= 96
        if target == "sm_90":
            for kind in ("ld", "st"):
                widths = re.findall(rf"\b{kind}\.global(?:\.v(\d))?\.b(\d+)", compiled.asm["ptx"])
                sizes = {int(vector or 1) * int(bits) // 8 for vector, bits in widths}
                assert sizes == {1, 2, 4, 8, 16}


def test_offsets_beyond_32_bits():
    """N C = 4.2e9: products are 64-bit."""
    (found,) = step_launches(128256, torch.bfloat16, rows=SHORT)
    ptx = aot.build(found, "sm_90").asm["ptx"]
    assert re.search(r"(mul|mad)\.(wide|lo)\.[su](32|64)", ptx)

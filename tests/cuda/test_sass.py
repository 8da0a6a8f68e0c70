# SPDX-License-Identifier: Apache-2.0
"""What the compiler made of the CUDA kernels: registers, stack, spills and the width of loads, read
from the machine code for sm_90."""

import functools
import os
import re
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.cuda.count import Kernel, cost
from tests.cuda.sass import CSRC, NVCC, run, tool

LOSSES = ("loss_f32", "loss_bf16", "loss_f64")
SOURCES = (*LOSSES, "gate", "softmax", "compact")
# Of float16, which differs from bfloat16 in a type alone, the kernels with the fewest registers to
# spare: all take as long to compile as the tests of half the others.
HALF = """
#include "{folder}/cuda/loss_run.cuh"
namespace msdkern {{
template __global__ void loss_kernel<__half, Tiled<__half, 8>, kTileThreads, 1>(
    const __grid_constant__ msdkern_loss, const __grid_constant__ Plan, Form);
template __global__ void loss_kernel<__half, Registers<__half, 8, 1>, 128, 3>(
    const __grid_constant__ msdkern_loss, const __grid_constant__ Plan, Form);
}}
"""
REGISTERS = 64 * 1024  # of a processor, and the piece in which warps get them
PIECE, THREADS_PER_WARP = 256, 32


@pytest.fixture(scope="module")
def cubins(tmp_path_factory):
    if not os.path.exists(NVCC):
        pytest.skip("nvcc is not installed")
    if tool() is None:
        pytest.skip("cuobjdump is not installed")
    folder = tmp_path_factory.mktemp("sass")
    flags = ("-std=c++17", "-O3", "-arch=sm_90", "-cubin")
    half = folder / "loss_f16.cu"
    half.write_text(HALF.format(folder=CSRC))
    sources = [*(CSRC / "cuda" / f"{name}.cu" for name in SOURCES), half]
    compiled = [folder / f"{source.stem}.cubin" for source in sources]
    with ThreadPoolExecutor(2) as pool:
        jobs = [
            (NVCC, *flags, source, "-o", out) for source, out in zip(sources, compiled, strict=True)
        ]
        list(pool.map(lambda job: run(*job), jobs))
    return compiled


def kernels(cubin):
    """name -> {REG, STACK, LOCAL, ...} of every kernel."""
    found = re.findall(r"Function (\S+):\s+(REG:[^\n]*)", run(tool(), "-res-usage", cubin))
    assert found, "cuobjdump names no kernel"
    return {
        name: {key: int(value) for key, value in re.findall(r"(\w+)(?:\[0\])?:(\d+)", usage)}
        for name, usage in found
    }


def test_no_kernel_has_a_stack_frame_or_spills(cubins):
    frames = {
        name: usage
        for cubin in cubins
        for name, usage in kernels(cubin).items()
        if usage["STACK"] or usage["LOCAL"]
    }
    assert not frames
    for cubin in cubins:
        assert not re.findall(r"\b(?:STL|LDL)\b", sass(cubin))


def resident(registers, threads):
    """Blocks that a processor's registers hold."""
    per_warp = -(-registers * THREADS_PER_WARP // PIECE) * PIECE
    return REGISTERS // (per_warp * (threads // THREADS_PER_WARP))


def test_registers_leave_room_for_the_blocks_that_the_ladder_claims(cubins):
    """The ladder's row is a template argument: ...ELi<threads>ELi<blocks>E..."""
    seen = 0
    for cubin in cubins:
        for name, usage in kernels(cubin).items():
            claim = re.search(r"loss_kernel.*ELi(\d+)ELi(\d+)EEEv", name)
            if claim:
                threads, blocks = map(int, claim.groups())
                assert resident(usage["REG"], threads) >= blocks, (name, usage["REG"])
                seen += 1
                # Blocks of fewer threads, as many threads in all.
                if "TiledI" in name or "StreamedI" in name:
                    assert resident(usage["REG"], 128) >= 3, (name, usage["REG"])
    assert seen == 6 * 2 + 2 + 2  # float64 has no tiles: shared memory or none


# Blocks of 256 threads per processor that ways.h and softmax.cu claim, by the storage type.
CLAIMS = {
    "gate_kernel": {"f": 4, "d": 2, "6__half": 3, "13__nv_bfloat16": 3},
    "statistics_kernel": {"f": 4, "d": 2, "6__half": 3, "13__nv_bfloat16": 3},
    "held_softmax_kernel": {"f": 3, "d": 2, "6__half": 2, "13__nv_bfloat16": 2},
    "held_softmax_backward_kernel": {"f": 3, "d": 2, "6__half": 2, "13__nv_bfloat16": 2},
}
MEASURES = {"gate_kernel": 4}  # instances per type; of others one


def row_kernels(cubins):
    """(cubin, mangled name, usage, kernel, type) of all that read a row once."""
    for cubin in cubins:
        for name, usage in kernels(cubin).items():
            found = re.search(rf"\d({'|'.join(CLAIMS)})I(f|d|6__half|13__nv_bfloat16)", name)
            if found:
                yield cubin, name, usage, *found.groups()


def test_registers_leave_room_for_the_blocks_that_read_rows_once(cubins):
    seen = dict.fromkeys(CLAIMS, 0)
    for _, name, usage, kernel, storage in row_kernels(cubins):
        assert resident(usage["REG"], 256) >= CLAIMS[kernel][storage], (name, usage["REG"])
        seen[kernel] += 1
    assert seen == {kernel: 4 * MEASURES.get(kernel, 1) for kernel in CLAIMS}


def test_rows_that_are_read_once_are_read_16_bytes_at_a_time(cubins):
    """Four loads in flight where rows begin on 16 bytes; two rows in the backward."""
    for cubin, name, _, kernel, _ in row_kernels(cubins):
        body = body_of(cubin, name)
        assert widths(body, "LDG")[128] == (8 if "backward" in kernel else 4), name
        assert widths(body, "STG")[128] == (4 if "softmax" in kernel else 0), name


def test_rows_are_copied_16_bytes_at_a_time(cubins):
    seen = 0
    for cubin in cubins:
        for name in kernels(cubin):
            if "copy_kernel" in name:
                body = body_of(cubin, name)
                assert widths(body, "LDG")[128] == widths(body, "STG")[128] == 4
                seen += 1
    assert seen == 1


@functools.cache
def sass(cubin):
    return run(tool(), "-sass", cubin)


def body_of(cubin, kernel):
    text = sass(cubin)
    start = text.index(f"Function : {kernel}")
    end = text.find("Function :", start + 1)
    return text[start : end if end > 0 else None]


def widths(body, instruction):
    """How many accesses of each width, in bits."""
    counts = dict.fromkeys((8, 16, 32, 64, 128), 0)
    for modifiers in re.findall(rf"\b{instruction}((?:\.\w+)*)", body):
        width = re.search(r"\.[US](8|16)\b|\.(64|128)\b", modifiers)
        counts[int(width.group(1) or width.group(2)) if width else 32] += 1
    return counts


def test_rows_move_16_bytes_at_a_time(cubins):
    """With the row set in registers there is no other way for a row: one load and one store of 16
    bytes for each of 8 exits and each chunk, and none of 2 or 4 bytes where rows are stored."""
    for cubin in cubins:
        for name in kernels(cubin):
            chunks = re.search(r"RegistersI.*?Li8ELi(\d)E", name)
            if not chunks:
                continue
            body = body_of(cubin, name)
            assert widths(body, "LDG")[128] >= 8 * int(chunks.group(1)), name
            assert widths(body, "STG")[128] >= 8 * int(chunks.group(1)), name


def test_rows_reach_shared_memory_without_registers(cubins):
    for cubin in cubins:
        for name in kernels(cubin):
            if "loss_kernel" in name and re.search("SharedI|TiledI", name):
                body = body_of(cubin, name)
                copies = re.findall(r"\bLDGSTS((?:\.\w+)*)", body)
                assert copies, name
                assert all(".128" in modifiers for modifiers in copies), (name, copies)
                assert widths(body, "LDS")[128] > 0
                assert widths(body, "STG")[128] > 0


# What an H200 can issue and exponentiate per logit while it reads and writes it once.
@pytest.mark.parametrize(
    ("kernel", "slots", "exponentials"),
    [
        (Kernel("bfloat16", 4, "mutual", 3), 31, 2.1),
        (Kernel("float32", 8, "mutual", 0), 62, 4.1),
    ],
    ids=str,
)
def test_exponentials_are_kept_and_instructions_leave_room_for_the_bytes(
    cubins, kernel, slots, exponentials
):
    found = cost(kernel)
    assert found.slots <= slots
    assert 1.5 < found.exponentials <= exponentials

# SPDX-License-Identifier: Apache-2.0
"""Ahead-of-time compilation of what a call would launch, for GPUs that are not there.

`launches` runs an op of executor `triton` on tensors of the meta device and records each kernel
with its arguments; `build` compiles a record as Triton's launcher would have: pointers and
integers that are multiples of 16 are known to be, integers equal to 1 and absent tensors are
constants, unless the kernel says that it is not to be specialised.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from triton.runtime.jit import JITFunction

from msdkern.executors.triton import registers, table
from msdkern.executors.triton.loss import loss_kernel
from msdkern.executors.triton.stacked import stacked_kernel

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TYPES = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16",
    torch.float64: "*fp64", torch.int64: "*i64", torch.int32: "*i32", torch.int8: "*i8",
}  # fmt: skip
DIVISIBLE = [["tt.divisibility", 16]]


@dataclasses.dataclass(frozen=True)
class Launch:
    """One recorded kernel launch."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    warps: int
    fusion: bool


def launches(function, *arguments) -> list[Launch]:
    """The launches of `function(*arguments)`, none of which runs."""
    found: list[Launch] = []
    kept = JITFunction.run

    def record(self, *values, grid, warmup, num_warps=4, enable_fp_fusion=True, **named):
        names = [p.name for p in self.params]
        bound = dict(zip(names, values, strict=False)) | named
        found.append(Launch(self, grid, bound, num_warps, enable_fp_fusion))

    JITFunction.run = record
    try:
        function(*arguments)
    finally:
        JITFunction.run = kept
    return found


def _describe(value, path, signature, constants, attributes, special=True):
    if isinstance(value, tuple):
        inner = []
        for i, item in enumerate(value):
            _describe(item, (*path, i), inner, constants, attributes)
        signature.append(tuple(inner))
    elif value is None or (isinstance(value, int) and value == 1 and special):
        constants[path] = value
        signature.append("constexpr")
    elif isinstance(value, torch.Tensor):
        signature.append(TYPES[value.dtype])
        attributes[path] = DIVISIBLE  # tensors of the meta device have no address: aligned
    elif isinstance(value, int):
        signature.append("i32" if -(2**31) <= value < 2**31 else "i64")
        if value % 16 == 0 and special:
            attributes[path] = DIVISIBLE
    else:
        signature.append("fp32")


def describe(launch: Launch):
    """Types, constants and known alignments of the arguments: what one compilation serves."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
            constants[(i,)] = value
            continue
        described: list[Any] = []
        special = not parameter.do_not_specialize
        _describe(value, (i,), described, constants, attributes, special)
        signature[parameter.name] = described[0]
    return signature, constants, attributes


def build(launch: Launch, target: str, **options):
    """The compiled kernel, with as many registers as its first launch would have settled on."""
    signature, constants, attributes = describe(launch)
    kept = {"num_warps": launch.warps, "enable_fp_fusion": launch.fusion} | options
    source = ASTSource(launch.kernel, signature, constexprs=constants, attrs=attributes)

    def one(**limit: int):
        compiled = compile(source, target=TARGETS[target], options=kept | limit)
        binary = examine(compiled, target)
        compiled.n_regs, compiled.n_spills = binary.registers, binary.spilled  # as once loaded
        return compiled

    searched = launch.kernel in (loss_kernel, stacked_kernel) and "maxnreg" not in options
    if TARGETS[target].backend == "hip" or not searched:
        return one()
    threads, resident = launch.warps * table.THREADS, launch.arguments["RESIDENT"]
    return registers.spill_free(one, threads, resident)[1]


# What the binary says ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Binary:
    registers: int
    spilled: int  # bytes of local memory, or of scratch, per thread
    shared: int


def _tool(name: str) -> str:
    here = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    found = str(here) if here.exists() else shutil.which(name)
    assert found, f"{name} is not there"
    return found


def examine(compiled, target: str) -> Binary:
    """Registers and spills, from the binary itself."""
    if TARGETS[target].backend == "hip":
        text = compiled.asm["amdgcn"]
        registers = int(re.search(r"\.vgpr_count:\s*(\d+)", text)[1])
        spilled = int(re.search(r"\.private_segment_fixed_size:\s*(\d+)", text)[1])
        return Binary(registers, spilled, compiled.metadata.shared)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        done = subprocess.run(
            [_tool("cuobjdump"), "-res-usage", file.name], capture_output=True, text=True
        )
    assert done.returncode == 0, done.stderr
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", done.stdout)
    assert usage, done.stdout
    registers, stack, shared, local = map(int, usage.groups())
    return Binary(registers, stack + local, shared)


def row_accesses(ptx: str, smallest: int) -> dict[str, list[int]]:
    """Bytes per thread of the loads and stores of global memory that move at least `smallest` at
    once, in the order of the code. Not counted: labels, which are 64-bit, and sums that other
    programs have written, which are read past the first-level cache."""
    found: dict[str, list[int]] = {"ld": [], "st": []}
    for match in re.finditer(r"\b(ld|st)\.global((?:\.\w+|::\w+)*)", ptx):
        width = re.search(r"\.v(\d)", match[2])
        bits = int(re.search(r"\.[bufs](\d+)\b", match[2])[1])
        size = (int(width[1]) if width else 1) * bits // 8
        if bits <= 32 and ".cg" not in match[2] and size >= smallest:
            found[match[1]].append(size)
    return found

# SPDX-License-Identifier: Apache-2.0
"""What the loss should cost on a GPU, from the machine code: a prediction, not a measurement.

    python -m tests.cuda.predict            # the table for the loss cases of bench/cases.py

Each sweep's innermost loop is found in the compiled kernel and its instructions are counted per
logit. A time is the largest of three: bytes over the bandwidth of a copy, instructions over issue
slots, exponentials over what the special function units do. Reality adds what does not overlap.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.cases import CASES, Case
from tests.cuda.sass import CSRC, NVCC, instructions, loops, run

# H200: processors, clock, and per processor and clock lanes that issue and exponentials.
PROCESSORS, CLOCK, ISSUE, EXPONENTIALS, COPY = 132, 1.98e9, 128, 16, 4.3e12
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
TYPES = {"float32": "float", "bfloat16": "bfloat", "float16": "__half"}
PAIRS = {"mutual": "MUTUAL", "last": "LAST", "dense": "DENSE", "none": "NONE"}
# A row's maximum, both sums and value go through a warp by shuffles: per thread and row.
REDUCTIONS = 4 * 14
MOST = 8  # exits of the sweeps that are counted

# The branches that a case takes, and none that it does not, in a copy of the sources. Each pattern
# must be there, lest the count be of something else.
ALWAYS = (
    ("tile.cuh", r"s\.template dense<Home>\(\)", "false"),
    ("tile_sums.cuh", r"s\.template dense<Home>\(\)", "false"),
    ("tile.cuh", r"\bs\.gradient\b(?!_)", "true"),
    ("tile.cuh", r"next < s\.call\.rows", "true"),
    (
        "tile.cuh",
        r"(unsigned\(\(W - 1\) \* step\)\) return;)",
        r'\1 asm volatile("trap;"); return;',
    ),
    ("rows.cuh", r"return vector && first\(i\) \+ V <= classes;", "return true;"),
)
KERNEL = """
#include "cuda/loss_run.cuh"
namespace msdkern {{
__global__ void __launch_bounds__(kTileThreads, 1)
    counted(const __grid_constant__ msdkern_loss call, const __grid_constant__ Plan plan, Form f) {{
    take_samples<{type}, {home}<{type}, {rows}>>(call, plan, f);
}}
}}
"""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One specialisation of the sweeps: what decides how many instructions a logit takes."""

    dtype: str
    rows: int  # 4 or 8
    pair: str
    power: int  # T where it is a small integer, else 0
    home: str = "Tiled"

    def source(self, folder: Path) -> Path:
        """A .cu file beside a copy of csrc/ in which every branch is decided."""
        shutil.copytree(CSRC, folder, dirs_exist_ok=True)
        divergent = "false" if self.pair == "none" else "true"
        edits = (
            *ALWAYS,
            ("tile.cuh", r"s\.call\.pairs", f"MSDKERN_PAIRS_{PAIRS[self.pair]}"),
            ("tile.cuh", r"switch \(s\.power\)", f"switch ({self.power})"),
            ("tile_sums.cuh", r"switch \(s\.power\)", f"switch ({self.power})"),
            ("tile.cuh", r"\bs\.divergent\b", divergent),
        )
        for name, pattern, text in edits:
            path = folder / "cuda" / name
            changed, count = re.subn(pattern, text, path.read_text())
            if not count:
                raise ValueError(f"predict: {name} must have {pattern!r}; got none")
            path.write_text(changed)
        out = folder / "counted.cu"
        out.write_text(KERNEL.format(type=TYPES[self.dtype], home=self.home, rows=self.rows))
        return out

    @property
    def vector(self) -> int:
        return 16 // BYTES[self.dtype]


@dataclasses.dataclass(frozen=True)
class Cost:
    """Per logit: instructions issued and exponentials, in all sweeps."""

    slots: float
    exponentials: float


def cost(kernel: Kernel) -> Cost:
    """Compiles the kernel for sm_90 and counts its loops."""
    with tempfile.TemporaryDirectory(prefix="msdkern-predict-") as name:
        folder = Path(name)
        out = folder / "counted.cubin"
        run(NVCC, "-std=c++17", "-O3", "-arch=sm_90", "-cubin", kernel.source(folder), "-o", out)
        code = instructions(out)["counted"]
    found = [Sweep.of(code, begin, end) for begin, end in loops(code)]
    busy = [s for s in found if s["MUFU.EX2"] >= 8]  # and not one row's scalars
    last = _smallest(s for s in busy if s["STG.128"])
    half = _smallest(s for s in busy if last.begin < s.begin <= s.end < last.end and not s["STG"])
    # The loop over the halves of a chunk goes round twice for each time of the loop over chunks.
    total = [s + h for s, h in zip(last.totals(), half.totals(), strict=True)]
    sweeps = [(total, kernel.rows * kernel.vector)]
    move = "LDG.128" if kernel.home == "Streamed" else "LDS.128"
    inner = [s for s in found if s[move] and not s["STG"] and not s["STS"]]
    sums = _smallest(s for s in inner if s["MUFU.EX2"] >= 8)
    sweeps.append((sums.totals(), sums[move] * kernel.vector))
    if kernel.home == "Tiled":
        top = _smallest(s for s in inner if not s["MUFU.EX2"])
        sweeps.append((top.totals(), top[move] * kernel.vector))
    return Cost(*(sum(totals[i] / logits for totals, logits in sweeps) for i in (0, 1)))


class Sweep(Counter[str]):
    """How often each instruction is in a loop: `LDS`, and `LDS.128` where that is its width."""

    begin = end = 0

    @classmethod
    def of(cls, code: list[tuple[int, str]], begin: int, end: int) -> Sweep:
        sweep = cls()
        sweep.begin, sweep.end = begin, end
        for address, text in code:
            if begin <= address <= end:
                name, *modifiers = text.split()[0].split(".")
                sweep.update([name, *(f"{name}.{m}" for m in modifiers if m in ("128", "EX2"))])
                sweep["all"] += 1
        return sweep

    def totals(self) -> tuple[int, int]:
        return self["all"], self["MUFU.EX2"]


def _smallest(sweeps: object) -> Sweep:
    return min(sweeps, key=lambda s: s["all"])  # type: ignore[call-overload, no-any-return]


def kernel_of(case: Case) -> Kernel | None:
    """Which sweeps serve a case; None where others do."""
    few = case.exits <= 4
    if case.family != "loss" or case.exits > MOST or case.pair not in PAIRS:
        return None
    if case.pair == "dense" and not few:
        return None
    t = case.temperature if case.pair != "none" else 1.0
    power = int(t) if t in (1.0, 2.0, 3.0, 4.0) else 0
    return Kernel(case.dtype, 4 if few else 8, case.pair, power)


def predict(case: Case, spent: Cost) -> dict[str, float]:
    """Microseconds of each bound on an H200, and the floor's share of the largest."""
    logits = case.exits * case.rows * case.classes
    moved = 2 * logits * BYTES[case.dtype]
    threads = logits / case.exits / case.rows / _threads(case)  # logits of a row that a thread has
    slots = spent.slots + REDUCTIONS / threads
    bounds = {
        "bytes": moved / COPY,
        "issue": logits * slots / (PROCESSORS * CLOCK * ISSUE),
        "exponentials": logits * spent.exponentials / (PROCESSORS * CLOCK * EXPONENTIALS),
    }
    return {
        "slots": slots,
        **{name: 1e6 * seconds for name, seconds in bounds.items()},
        "floor": bounds["bytes"] / max(bounds.values()),
    }


def _threads(case: Case) -> int:
    """Threads that share a row: those of csrc/cuda/ladder.h."""
    per_chunk = 16 // BYTES[case.dtype]
    pieces = -(-case.classes // per_chunk)
    for lanes in (8, 32):
        if pieces <= 4 * lanes:
            return lanes
    blocks = 1
    while case.exits * -(-pieces // (128 * blocks)) * 128 * 16 > 64 * 1024 and blocks < 16:
        blocks *= 2
    return 128 * blocks


def table(cases: list[Case]) -> list[str]:
    """Markdown, one line per case."""
    kernels = {case: kernel_of(case) for case in cases}
    wanted = sorted({k for k in kernels.values() if k is not None}, key=repr)
    with ThreadPoolExecutor(2) as pool:
        costs = dict(zip(wanted, pool.map(cost, wanted), strict=True))
    lines = [
        "| case | shape | dtype | slots / logit | exp / logit | bytes, µs | issue, µs | exp, µs |"
        " percent of the floor |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for case, kernel in kernels.items():
        if kernel is None:
            continue
        found = predict(case, costs[kernel])
        lines.append(
            f"| {case.name} | {case.shape} | {case.dtype} | {found['slots']:.1f} |"
            f" {costs[kernel].exponentials:.1f} | {found['bytes']:.1f} | {found['issue']:.1f} |"
            f" {found['exponentials']:.1f} | {100 * found['floor']:.0f} |"
        )
    return lines


def main() -> None:
    large = [c for c in CASES.values() if c.device == "cuda" and c.classes >= 1000]
    print("\n".join(table([c for c in large if c.rows * c.classes >= 1 << 20])))


if __name__ == "__main__":
    main()

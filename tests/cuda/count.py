# SPDX-License-Identifier: Apache-2.0
"""Instructions per logit of the loss on executor `cuda`, from the machine code of its sweeps.

A copy of csrc/ in which every branch that a call decides is decided is compiled for sm_90; the
loops over classes are found in it and counted.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import tempfile
from pathlib import Path

from tests.cuda.sass import CSRC, NVCC, Span, inside, instructions, loops, run, smallest

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
TYPES = {"float32": "float", "bfloat16": "bfloat", "float16": "__half"}
PAIRS = {"mutual": "MUTUAL", "last": "LAST", "dense": "DENSE", "none": "NONE"}
HELD, MOST_HELD = 4, 8  # rows of the two tiles

Code = list[tuple[int, str]]
Edit = tuple[str, str, str]  # file, pattern, text
# Each pattern must be there, lest the count be of something else.
WHOLE_CHUNKS: Edit = (
    "rows.cuh",
    r"return vector && has\(first\(i\)\) && first\(i\) \+ V <= classes;",
    "return true;",
)
IN_TILE: tuple[Edit, ...] = (
    ("tile.cuh", r"s\.template dense<Home>\(\)", "false"),
    ("tile_sums.cuh", r"s\.template dense<Home>\(\)", "false"),
    ("tile.cuh", r"\bs\.gradient\b(?!_)", "true"),
    ("tile.cuh", r"next < s\.call\.rows", "true"),
    (
        "tile.cuh",
        r"(unsigned\(\(W - 1\) \* step\)\) return;)",
        r'\1 asm volatile("trap;"); return;',
    ),
)
IN_SWEEPS: tuple[Edit, ...] = (
    ("sample.cuh", r"return !Home::kLean && dense_target;", "return false;"),
    ("sweeps.cuh", r"home\.keeps\(\)", "false"),
    ("sweeps.cuh", r"\bs\.gradient\b(?!_)", "true"),
    ("sweeps.cuh", r"s\.call\.gradient\[k\]", "true"),
    ("sweeps.cuh", r"s\.call\.detach_teacher", "true"),
    ("sweeps.cuh", r"\bs\.divergent\b", "true"),
)
KERNEL = """
#include "cuda/loss_run.cuh"
namespace msdkern {{
__global__ void __launch_bounds__({threads}, 1)
    counted(const __grid_constant__ msdkern_loss call, const __grid_constant__ Plan plan, Form f) {{
    take_samples<{type}, {home}>(call, plan, f);
}}
}}
"""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One specialisation of the sweeps: what decides how many instructions a logit takes."""

    dtype: str
    rows: int  # that are held at once: 4 or 8; 0: none, exit after exit
    pair: str
    power: int  # T where it is a small integer, else 0
    divergence: str = "forward_kl"
    home: str = "Tiled"

    @property
    def vector(self) -> int:
        return 16 // BYTES[self.dtype]

    def edits(self) -> tuple[Edit, ...]:
        pairs = f"MSDKERN_PAIRS_{PAIRS[self.pair]}"
        formula = f"MSDKERN_{self.divergence.upper()}"
        if self.rows:
            return (
                *IN_TILE,
                WHOLE_CHUNKS,
                ("tile.cuh", r"s\.call\.pairs", pairs),
                ("tile.cuh", r"switch \(s\.power\)", f"switch ({self.power})"),
                ("tile_sums.cuh", r"switch \(s\.power\)", f"switch ({self.power})"),
                ("tile.cuh", r"\bs\.divergent\b", "false" if self.pair == "none" else "true"),
            )
        general = "false" if self.divergence == "forward_kl" else "true"
        return (
            *IN_SWEEPS,
            WHOLE_CHUNKS,
            ("sample.cuh", r"switch \(power\)", f"switch ({self.power})"),
            ("sweeps.cuh", r"\bs_?\.call\.pairs", pairs),
            ("sweeps.cuh", r"\bs_?\.call\.divergence", formula),
            ("loss.cuh", r"plan\.general", general),
            ("loss.cuh", r"Named<S, Home>::serves\(call\)", "false"),
        )

    def source(self, folder: Path) -> Path:
        """A .cu file beside a copy of csrc/ in which every branch is decided."""
        shutil.copytree(CSRC, folder, dirs_exist_ok=True)
        for name, pattern, text in self.edits():
            path = folder / "cuda" / name
            changed, count = re.subn(pattern, text, path.read_text())
            if not count:
                raise ValueError(f"count: {name} must have {pattern!r}; got none")
            path.write_text(changed)
        out = folder / "counted.cu"
        storage = TYPES[self.dtype]
        home = f"{self.home}<{storage}, {self.rows}>" if self.rows else f"Shared<{storage}>"
        threads = "kTileThreads" if self.rows else "256"
        out.write_text(KERNEL.format(type=storage, home=home, threads=threads))
        return out


@dataclasses.dataclass(frozen=True)
class Cost:
    """Instructions issued and exponentials, in all sweeps: per logit; per logit and teacher of its
    exit, where pairs are taken one by one; per row and thread besides."""

    slots: float
    exponentials: float
    slots_per_pair: float = 0
    exponentials_per_pair: float = 0
    row: float = 0


def spans(kernel: Kernel) -> tuple[Code, list[Span]]:
    """The machine code, and every loop."""
    with tempfile.TemporaryDirectory(prefix="msdkern-count-") as name:
        folder = Path(name)
        out = folder / "counted.cubin"
        run(NVCC, "-std=c++17", "-O3", "-arch=sm_90", "-cubin", kernel.source(folder), "-o", out)
        code = instructions(out)["counted"]
    return code, [Span.of(code, begin, end) for begin, end in loops(code)]


def cost(kernel: Kernel) -> Cost:
    """Compiles the kernel for sm_90 and counts its loops."""
    code, found = spans(kernel)
    return _held(kernel, code, found) if kernel.rows else _one_by_one(kernel, code, found)


def _row_loop(found: list[Span], move: str, exponentials: int) -> tuple[Span, Span]:
    """The loop over rows that ends in shuffles, and the one over a row's classes in it."""
    for around in sorted((s for s in found if s["SHFL"]), key=lambda s: s["all"]):
        if bool(exponentials) != bool(around["MUFU.EX2"]):
            continue
        classes = [
            s
            for s in inside(found, around)
            if s[move] and not s["ATOMS"] and s["MUFU.EX2"] >= exponentials
        ]
        if classes:
            return around, smallest(classes)
    raise ValueError(f"count: the loop with {move} and {exponentials} exponentials must be there")


class Total:
    """Adds up (instructions, exponentials) per logit."""

    def __init__(self) -> None:
        self.slots = self.exponentials = 0.0

    def add(self, span: Span, logits: float, less: Span | None = None) -> None:
        less = less or Span()
        self.slots += (span["all"] - less["all"]) / logits
        self.exponentials += (span["MUFU.EX2"] - less["MUFU.EX2"]) / logits


def _row_sums(kernel: Kernel, code: Code, found: list[Span], total: Total) -> float:
    """The loops over one row's classes before the last sweep: the maximum and the sums. Returns
    what a row takes besides: shuffles above all. The class that is predicted is rarely looked for,
    and teams of less than a warp have other shuffles, with MATCH."""
    move = "LDG.128" if kernel.home == "Streamed" else "LDS.128"
    row = 0.0
    for exponentials in (True,) if kernel.home == "Streamed" else (False, True):
        around, loop = _row_loop(found, move, kernel.vector if exponentials else 0)
        total.add(loop, loop[move] * kernel.vector)
        lean = Span.of(code, around.begin, around.end, "ATOMS", "ATOM", "MATCH")
        row += lean["all"] - loop["all"]
    return row


def _held(kernel: Kernel, code: Code, found: list[Span]) -> Cost:
    """Some classes of all exits at once."""
    total = Total()
    busy = [s for s in found if s["MUFU.EX2"] >= 8]  # and not one row's scalars
    last = smallest(s for s in busy if s["STG.128"])
    half = smallest(s for s in inside(busy, last) if not s["STG"])
    logits = kernel.rows * kernel.vector
    # The loop over the halves of a chunk goes round twice for each time of the loop over chunks.
    total.add(last, logits)
    total.add(half, logits)
    row = _row_sums(kernel, code, found, total)
    return Cost(total.slots, total.exponentials, row=row)


def _one_by_one(kernel: Kernel, code: Code, found: list[Span]) -> Cost:
    """Exit after exit, or pair after pair. A loop goes over a chunk of one row."""
    total, pair = Total(), Total()
    row = _row_sums(kernel, code, found, total)
    busy = [s for s in found if s["MUFU.EX2"] >= kernel.vector]
    last = smallest(s for s in busy if s["STG.128"])
    nested = inside(busy, last)
    if nested:  # over teachers, within the loop over students
        teachers = smallest(nested)
        total.add(last, kernel.vector, teachers)
        pair.add(teachers, kernel.vector)
    else:
        total.add(last, kernel.vector)
    before = [s for s in busy if s["LDS.128"] >= 2 and not s["STG"] and s not in nested]
    if kernel.divergence != "forward_kl":  # values of all pairs, first
        pair.add(smallest(before), kernel.vector)
    elif kernel.pair == "mutual":  # what all exits teach
        total.add(smallest(before), kernel.vector)
    return Cost(total.slots, total.exponentials, pair.slots, pair.exponentials, row)

# SPDX-License-Identifier: Apache-2.0
"""What the loss should cost on a GPU, from the machine code of executors `cuda` and `triton`: a
prediction, not a measurement.

    python -m tests.cuda.predict            # the loss cases of bench/cases.py
    python -m tests.cuda.predict --regions  # those of msdkern/executors/order.py

A time is the largest of four: bytes over the bandwidth of a copy, instructions over issue slots,
exponentials over what the special function units do, and what one program takes by itself, loads
waited for, times the programs that follow each other. Reality adds what does not overlap.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import re
from concurrent.futures import ThreadPoolExecutor

from bench.cases import CASES, Case
from msdkern.executors import order
from tests.cuda import count_triton
from tests.cuda.count import BYTES, HELD, MOST_HELD, Cost, Kernel, cost
from tests.cuda.sass import CSRC

# H200: processors, clock, and per processor and clock lanes that issue and exponentials; bytes per
# second of a copy; second-level cache; seconds that a load takes; of a processor, registers, the
# piece in which warps get them, and bytes of shared memory.
PROCESSORS, CLOCK, ISSUE, EXPONENTIALS, COPY = 132, 1.98e9, 128, 16, 4.3e12
CACHE, LATENCY, REGISTERS, PIECE, SHARED = 50e6, 0.7e-6, 64 * 1024, 256, 227 * 1024
WARP = 32
# Instructions per sample besides sweeps and rows, of a team's first warp and of the others: scales,
# logarithms, divergences, sums; and per exit. Read off the machine code by eye.
SAMPLE, SAMPLE_OTHERS, SAMPLE_EXIT = 1100, 300, 110
READ_AHEAD = 4  # pieces of a row that are loaded at once where it is kept nowhere


@dataclasses.dataclass(frozen=True)
class Work:
    """What a program (the samples that threads of a block take on together) is to the machine."""

    samples: int
    warps: int  # of a block
    blocks: int  # a cluster's
    resident: float  # programs per processor
    passes: float  # over all logits, reading and writing, of memory
    slots: float  # instructions per logit
    exponentials: float
    waits: float  # loads that are waited for, one after another


def bounds(case: Case, work: Work) -> dict[str, float]:
    """Seconds of each."""
    sample = case.exits * case.classes
    logits, size = sample * case.rows, BYTES[case.dtype]
    issued = work.samples * sample * work.slots / WARP  # warps' instructions of a program
    alone = issued / (min(4, work.warps) * work.blocks) / CLOCK
    turns = max(1.0, case.rows / (work.samples * PROCESSORS * work.resident))
    return {
        "bytes": work.passes * logits * size / COPY,
        "issue": logits * work.slots / (PROCESSORS * CLOCK * ISSUE),
        "exponentials": logits * work.exponentials / (PROCESSORS * CLOCK * EXPONENTIALS),
        "alone": turns * (work.waits * LATENCY + alone),
    }


# Executor `cuda` --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Rung:
    """A row of csrc/cuda/ladder.h."""

    home: str
    rows: int
    chunks: int
    lanes: int
    threads: int
    blocks: int
    kilobytes: int
    resident: int


@functools.cache
def ladder(name: str) -> tuple[Rung, ...]:
    text = (CSRC / "cuda" / "ladder.h").read_text()
    body = re.search(rf"{name}\[\] = {{(.*?)\n}};", text, re.S)
    if body is None:
        raise ValueError(f"predict: ladder.h must have {name}; got none")
    rows = re.findall(r"Home::k(\w+),([\d\s,]+)}", body.group(1))
    return tuple(Rung(home, *map(int, numbers.split(","))) for home, numbers in rows)


def rung_of(case: Case, held: bool) -> tuple[Rung, int]:
    """What serves a case, and how many pieces of a row a thread has; as csrc/cuda/loss_run.cuh."""
    vector = 16 // BYTES[case.dtype]
    rows = case.exits + case.teachers
    pieces = -(-case.classes // vector)
    lean = case.pair not in ("dense", "teacher")
    for rung in ladder("kTileLadder" if held else "kLadder"):
        chunks = -(-pieces // (rung.lanes * rung.blocks))
        if held and rung.home != "Shared" and not lean:
            continue
        if rung.home == "Registers" and case.classes % vector:
            continue
        if (rung.rows and rows > rung.rows) or (rung.chunks and chunks > rung.chunks):
            continue
        if rung.blocks > 1 and 2 * case.classes <= vector * rung.lanes * rung.blocks:
            continue
        if rung.home != "Shared" or _fits(rung, rows, chunks, case.exits, held):
            return rung, chunks
    raise ValueError("predict: the last rung serves everything")


def _fits(rung: Rung, rows: int, chunks: int, exits: int, held: bool) -> bool:
    """In shared memory: the row set and, per thread, a number per row or two per exit; what teams
    keep besides is little."""
    row_set = rows * chunks * rung.threads * 16
    values = (rows if held else 2 * exits) * rung.threads * 4
    fits = row_set + values + 4096 <= SHARED // rung.resident
    return fits and row_set <= rung.kilobytes * 1024


def kernel_of(case: Case, divergence: str = "forward_kl") -> Kernel:
    """Which sweeps serve a case."""
    rows = case.exits + case.teachers
    held = divergence == "forward_kl" and rows <= MOST_HELD and (rows <= HELD or case.exits > HELD)
    pair = "dense" if case.pair == "teacher" else case.pair
    t = case.temperature if pair != "none" else 1.0
    power = int(t) if t in (1.0, 2.0, 3.0, 4.0) else 0
    rung, _ = rung_of(case, held)
    home = "Streamed" if held and rung.home == "Global" else "Tiled"
    few = rows <= HELD and home == "Tiled"
    size = (HELD if few else MOST_HELD) if held else 0
    return Kernel(case.dtype, size, pair, power, divergence, home)


def cuda_work(case: Case, kernel: Kernel, spent: Cost) -> Work:
    held = kernel.rows > 0
    rung, chunks = rung_of(case, held)
    rows = case.exits + case.teachers
    threads = rung.lanes * rung.blocks
    filled = case.classes / (chunks * threads * kernel.vector)
    teachers = rows - (case.pair != "teacher")
    slots = spent.slots + teachers * spent.slots_per_pair
    exponentials = spent.exponentials + teachers * spent.exponentials_per_pair
    warps = max(1, threads // WARP)
    sample = (SAMPLE + SAMPLE_EXIT * rows + (warps - 1) * SAMPLE_OTHERS) / warps
    besides = (spent.row * rows + sample) * threads / (case.exits * case.classes)
    streamed = rung.home == "Global"
    teams = rung.threads // rung.lanes
    fetched = held and rung.home == "Shared"  # while the sample before was worked on
    return Work(
        samples=1 if rung.blocks > 1 else teams,
        warps=rung.threads // WARP,
        blocks=rung.blocks,
        resident=rung.resident / rung.blocks,
        passes=3 if streamed else 2,
        slots=slots / filled * rows / case.exits + besides,
        exponentials=exponentials / filled * rows / case.exits,
        # A label comes before the rest, its logit after it.
        waits=2 + (2 * chunks / READ_AHEAD if streamed else 0 if fetched else 1),
    )


# Executor `triton` ------------------------------------------------------------------------------


def triton_work(case: Case, found: count_triton.Binary) -> Work:
    steps = 0 if found.resident else -(-case.classes // found.block)
    each = [once + steps * step for once, step in zip(found.once, found.step, strict=True)]
    logits = found.rows * case.exits * case.classes / found.threads  # of a thread
    per_warp = -(-found.registers * WARP // PIECE) * PIECE
    resident = max(1, min(REGISTERS // (per_warp * found.warps), 64 // found.warps))
    row_set = case.exits * case.classes * BYTES[case.dtype]
    cached = PROCESSORS * resident * row_set <= 0.8 * CACHE
    return Work(
        samples=found.rows,
        warps=found.warps,
        blocks=1,
        resident=resident,
        passes=2 if found.resident or cached else found.sweeps + 1,
        slots=each[0] / logits,
        exponentials=each[1] / logits,
        waits=1 + max(1, steps * found.sweeps),
    )


# Side by side -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Prediction:
    case: Case
    cuda: Work
    triton: Work

    def seconds(self, executor: str) -> float:
        return max(bounds(self.case, getattr(self, executor)).values())

    def limit(self, executor: str) -> str:
        found = bounds(self.case, getattr(self, executor))
        return max(found, key=lambda name: found[name])

    @property
    def ratio(self) -> float:
        """The time of `triton` over that of `cuda`."""
        return self.seconds("triton") / self.seconds("cuda")


def predictions(wanted: list[tuple[Case, str]]) -> list[Prediction]:
    """Of cases and divergences. Teachers' rows are exits to Triton's kernels."""
    kernels = [kernel_of(case, divergence) for case, divergence in wanted]
    several = sorted(set(kernels), key=repr)
    binaries = [
        (c.exits + c.teachers, c.classes, c.dtype, "dense" if c.teachers else c.pair, d)
        for c, d in wanted
    ]
    with ThreadPoolExecutor(2) as pool:
        costs = dict(zip(several, pool.map(cost, several), strict=True))
    found = {one: count_triton.binary(*one) for one in sorted(set(binaries))}
    return [
        Prediction(case, cuda_work(case, kernel, costs[kernel]), triton_work(case, found[one]))
        for (case, _), kernel, one in zip(wanted, kernels, binaries, strict=True)
    ]


HEADER = (
    "| case | shape | dtype | cuda: slots, exp | µs, by | % of the floor |"
    " triton: slots, exp, passes | µs, by | triton / cuda |",
    "|---|---|---|---|---|---|---|---|---|",
)


def line(p: Prediction) -> str:
    floor = 2 * p.case.exits * p.case.rows * p.case.classes * BYTES[p.case.dtype] / COPY
    took = {name: 1e6 * p.seconds(name) for name in ("cuda", "triton")}
    return (
        f"| {p.case.name} | {p.case.shape} | {p.case.dtype} |"
        f" {p.cuda.slots:.1f}, {p.cuda.exponentials:.1f} |"
        f" {took['cuda']:.1f} {p.limit('cuda')} | {100 * floor / p.seconds('cuda'):.0f} |"
        f" {p.triton.slots:.1f}, {p.triton.exponentials:.1f}, {p.triton.passes:g} |"
        f" {took['triton']:.1f} {p.limit('triton')} | {p.ratio:.2f} |"
    )


def table(wanted: list[tuple[Case, str]]) -> list[str]:
    """Markdown, one line per case."""
    return [*HEADER, *map(line, predictions(wanted))]


def regions() -> list[str]:
    """The rows of order.py as they are predicted now, in Python."""
    rows = order.REGIONS["cuda"]
    wanted = []
    for row in rows:
        exits, n, classes, dtype = row.at
        pair = "dense" if row.kind == "matrix" else "mutual"
        divergence = "jsd" if row.kind == "jsd" else "forward_kl"
        wanted.append((Case(row.kind, exits, n, classes, pair, dtype=dtype), divergence))
    lines = []
    for row, p in zip(rows, predictions(wanted), strict=True):
        cuda, triton = (round(1e6 * p.seconds(name), 1) for name in ("cuda", "triton"))
        now = row._replace(first=order.faster(cuda, triton), cuda=cuda, triton=triton)
        lines.append(order.source(now))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.cuda.predict", description=__doc__)
    parser.add_argument("--regions", action="store_true", help="the rows of executors/order.py")
    if parser.parse_args().regions:
        print("\n".join(regions()))
        return
    cases = [c for c in CASES.values() if c.device == "cuda" and c.family == "loss"]
    print("\n".join(table([(c, "forward_kl") for c in cases])))


if __name__ == "__main__":
    main()

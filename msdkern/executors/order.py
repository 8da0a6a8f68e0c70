# SPDX-License-Identifier: Apache-2.0
"""Which of a GPU's executors is first, by the kind of loss, the exits and the classes: one table.

DERIVED, NOT MEASURED: the times below are what `python -m tests.cuda.predict --regions` predicts
for an H200 from the machine code of both executors. `python -m bench.choose RESULTS.json` prints
the rows that results of `bash bench/gpu.sh` imply, and where they contradict these.

A prediction does not see every latency, no barrier, and nothing of the host. So `triton` is first
only where it is predicted to save a quarter of the time, and 10 microseconds, at the shape of the
row: its calls cost the host more, its kernels are compiled when they are first called, and larger
row sets stay on chip with `cuda`. The number of rows N is not asked for: the last, shorter batch
must not be another executor's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from msdkern.executors.arguments import LossArguments

ANY = 1 << 31


class Shape(NamedTuple):
    """What the table is asked about."""

    kind: str  # named: named pair weights, or none; matrix: any weights; jsd
    exits: int  # and external teachers
    classes: int


class Region(NamedTuple):
    """Calls that the same executor serves best: of a kind, with so many exits and classes at most.

    The times are microseconds of forward and backward at `at`: K, N, C and dtype.
    """

    kind: str
    exits: int
    classes: int
    first: str
    at: tuple[int, int, int, str]
    cuda: float
    triton: float

    def holds(self, shape: Shape) -> bool:
        within = shape.exits <= self.exits and shape.classes <= self.classes
        return within and shape.kind == self.kind

    @property
    def extent(self) -> str:
        """In words: `jsd, up to 7 exits and 64 classes`."""
        most = ((self.exits, "exits"), (self.classes, "classes"))
        limits = " and ".join(f"{n} {word}" for n, word in most if n != ANY)
        return f"{self.kind}, " + (f"up to {limits}" if limits else "any size")


# By device type; the first row that holds a call decides. Others, and other ops, take the order of
# executors.PREFERENCE.
BASIS = "derived from machine code, not measured"
# `triton` is first where it takes at most such a share of the time and saves at least so many
# microseconds. Measured times need no such margin: bench/choose.py prints what to put here then.
SHARE, SAVED = 0.75, 10.0
# fmt: off
REGIONS: dict[str, tuple[Region, ...]] = {
    "cuda": (
        Region("named", 8, 32, "cuda", (5, 4096, 10, "float32"), 3.4, 2.1),
        Region("named", 8, 256, "cuda", (5, 4096, 100, "float32"), 13.7, 7.7),
        Region("named", 8, 4096, "cuda", (7, 4096, 1000, "bfloat16"), 43.9, 144.0),
        Region("named", 8, ANY, "cuda", (4, 4096, 32000, "bfloat16"), 592.1, 1899.8),
        Region("named", ANY, 32, "cuda", (12, 4096, 10, "float32"), 7.0, 5.2),
        Region("named", ANY, ANY, "cuda", (12, 4096, 1000, "bfloat16"), 134.3, 340.4),
        Region("matrix", 8, 256, "cuda", (7, 4096, 100, "bfloat16"), 11.5, 20.2),
        Region("matrix", 8, ANY, "cuda", (7, 4096, 1000, "bfloat16"), 76.1, 216.5),
        Region("matrix", ANY, ANY, "cuda", (12, 4096, 1000, "bfloat16"), 354.5, 1446.6),
        Region("jsd", 5, 16, "triton", (5, 4096, 10, "float32"), 17.0, 4.7),
        Region("jsd", 7, 256, "triton", (5, 4096, 100, "float32"), 61.4, 41.2),
        Region("jsd", 7, ANY, "cuda", (4, 4096, 1000, "bfloat16"), 303.4, 267.0),
        Region("jsd", ANY, ANY, "cuda", (12, 4096, 1000, "bfloat16"), 3085.4, 5218.6),
    ),
}
# fmt: on


def source(row: Region) -> str:
    """A row of REGIONS as Python."""
    exits, classes = ("ANY" if n == ANY else str(n) for n in row[1:3])
    k, n, c, dtype = row.at
    return (
        f'Region("{row.kind}", {exits}, {classes}, "{row.first}", ({k}, {n}, {c}, "{dtype}"),'
        f" {row.cuda:.1f}, {row.triton:.1f}),"
    )


def faster(cuda: float, triton: float) -> str:
    """Who is first, from microseconds."""
    return "triton" if triton <= SHARE * cuda and cuda - triton >= SAVED else "cuda"


def kind_of(given: LossArguments) -> str:
    """The kind of a loss."""
    if given.divergence == "jsd" and given.pairs != "none" and given.formula == "jsd":
        return "jsd"
    return "matrix" if given.pairs == "dense" else "named"


def region_of(device: str, shape: Shape | None) -> Region | None:
    """The row that holds a call."""
    if shape is None:
        return None
    return next((r for r in REGIONS.get(device, ()) if r.holds(shape)), None)


def _known(exits: int, classes: int) -> bool:
    """Whether both are numbers: what a compiler leaves open must not be settled for this."""
    if torch.compiler.is_dynamo_compiling():
        static = torch.fx.experimental.symbolic_shapes.has_static_value
        return bool(static(exits) and static(classes))
    return type(exits) is type(classes) is int


def shape_of(logits: list[torch.Tensor], given: LossArguments) -> tuple[str, int, int] | None:
    """What the table is asked about a loss, a Shape without its name; None where a compiler leaves
    sizes open."""
    first = logits[0]
    exits = len(logits) if first.dim() == 2 else first.shape[0]
    classes = first.shape[-1]
    if not _known(exits, classes):
        return None
    return kind_of(given), exits + len(given.teacher_logits), classes

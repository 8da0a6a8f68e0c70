# SPDX-License-Identifier: Apache-2.0
"""Every shape that is measured, named, in one table."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from typing import Any

# Formulations tried by default; the four headline cases try all of them, because compiling K^2
# terms takes most of the time of a first run and has never won.
COLLAPSED = ("gram", "stacked", "mean teacher", "closed form")
EVERY = ("pairwise", "shared", *COLLAPSED)
PER_EXIT = ("per exit", "stacked")
GATES = ("softmax", "lse", "partition")
READ_ONLY = ("statistics", "gate")  # families that have no backward


@dataclass(frozen=True)
class Case:
    """K exits, N rows, C classes of one family, and what is asked of them."""

    name: str
    exits: int
    rows: int
    classes: int
    pair: str = "mutual"  # mutual | last | dense (arbitrary weights) | teacher (external) | none
    temperature: float = 3.0
    dtype: str = "float32"
    family: str = "loss"  # loss | softmax | statistics | gate
    device: str = "cpu"
    teachers: int = 0
    quick: bool = False
    formulations: tuple[str, ...] = field(default=COLLAPSED)

    @property
    def shape(self) -> str:
        """K, N and C as people write them."""
        return f"({self.exits}, {self.rows}, {self.classes})"

    @property
    def group(self) -> str:
        """family/shape/dtype and, for losses, the pair weights: cases that may be compared."""
        parts = [self.family, f"{self.exits}x{self.rows}x{self.classes}", self.dtype]
        return "/".join([*parts, self.pair] if self.family == "loss" else parts)

    def weights(self) -> tuple[tuple[float, ...], ...]:
        """The pair weights [K][K+E], student by teacher, as numbers."""
        columns = range(self.exits + self.teachers)
        return tuple(
            tuple(float(_WEIGHT[self.pair](i, j, self.exits)) for j in columns)
            for i in range(self.exits)
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data, as written in results."""
        return {**asdict(self), "formulations": list(self.formulations)}


# W_ij by name; "dense" is an arbitrary matrix with no structure to exploit.
_WEIGHT = {
    "none": lambda i, j, exits: 0,
    "mutual": lambda i, j, exits: 0 if i == j else 1 / (exits - 1),
    "last": lambda i, j, exits: i != j == exits - 1,
    "dense": lambda i, j, exits: 0 if i == j else (1 + (7 * i + 3 * j) % 5) / (3 * exits),
    "teacher": lambda i, j, exits: j >= exits,
}

_LOSS = (
    Case("overhead", 5, 1, 2),  # nothing to compute: what a call costs by itself
    Case("tiny", 5, 8, 10, quick=True, formulations=EVERY),
    Case("tiny_64", 5, 64, 10),
    Case("cifar10_msdnet5", 5, 256, 10),
    Case("cifar100_msdnet5", 5, 1024, 100, quick=True, formulations=EVERY),
    Case("cifar100_msdnet5_t2.5", 5, 1024, 100, temperature=2.5),
    Case("cifar100_msdnet5_last", 5, 1024, 100, pair="last"),
    Case("cifar100_msdnet5_dense", 5, 1024, 100, pair="dense"),
    Case("cifar100_msdnet5_ce", 5, 1024, 100, pair="none"),
    Case("cifar100_msdnet7", 7, 64, 100),
    Case("imagenet", 7, 256, 1000, quick=True, formulations=EVERY),
    Case("imagenet_t2.5", 7, 256, 1000, temperature=2.5),
    Case("imagenet_dense", 7, 256, 1000, pair="dense"),
    Case("imagenet_bf16", 7, 256, 1000, dtype="bfloat16"),
    Case("imagenet_teacher", 7, 256, 1000, pair="teacher", teachers=1),
    Case("bert_12exits", 12, 32, 2),
    Case("wide", 4, 128, 32000, formulations=EVERY),
    Case("llm", 2, 64, 128256, pair="last"),
    Case("llm_bf16", 2, 64, 128256, pair="last", dtype="bfloat16"),
)

_READ = (
    Case("cifar100_softmax", 5, 1024, 100, family="softmax", formulations=PER_EXIT),
    Case("imagenet_softmax", 7, 256, 1000, family="softmax", formulations=PER_EXIT),
    Case("tiny_statistics", 5, 8, 10, family="statistics", formulations=PER_EXIT),
    Case(
        "cifar100_statistics", 5, 1024, 100, family="statistics", formulations=PER_EXIT, quick=True
    ),
    Case("imagenet_statistics", 7, 256, 1000, family="statistics", formulations=PER_EXIT),
    Case("wide_statistics", 4, 128, 32000, family="statistics", formulations=PER_EXIT),
    *(
        Case(name, 1, *shape, "none", 1.0, dtype, "gate", quick=quick, formulations=GATES)
        for name, shape, dtype, quick in (
            ("tiny_gate", (8, 10), "float32", False),
            ("cifar10_gate", (256, 10), "float32", False),
            ("cifar100_gate", (8192, 100), "float32", True),
            ("imagenet_gate", (1024, 1000), "float32", False),
            ("wide_gate", (256, 32000), "float32", False),
            ("wide_gate_bf16", (256, 32000), "bfloat16", False),
        )
    ),
)

_CUDA = (
    Case("gpu_overhead", 5, 1, 2),
    Case("gpu_tiny", 5, 8, 10),
    Case("gpu_cifar100_msdnet5", 5, 1024, 100, quick=True, formulations=EVERY),
    Case("gpu_imagenet", 7, 256, 1000, quick=True, formulations=EVERY),
    Case("gpu_imagenet_large", 7, 65536, 1000),
    Case("gpu_imagenet_large_bf16", 7, 65536, 1000, dtype="bfloat16"),
    Case("gpu_imagenet_teacher", 7, 65536, 1000, pair="teacher", teachers=1, dtype="bfloat16"),
    Case("gpu_bert_12exits", 12, 32, 2),
    Case("gpu_4k_bf16", 4, 8192, 4096, dtype="bfloat16"),
    Case("gpu_wide", 4, 8192, 32000),
    Case("gpu_wide_bf16", 4, 8192, 32000, dtype="bfloat16", formulations=EVERY),
    Case("gpu_wide_bf16_last", 4, 8192, 32000, pair="last", dtype="bfloat16"),
    Case("gpu_wide_bf16_dense", 4, 8192, 32000, pair="dense", dtype="bfloat16"),
    Case("gpu_llm_bf16", 4, 4096, 128256, dtype="bfloat16"),
    Case("gpu_imagenet_softmax", 7, 65536, 1000, family="softmax", formulations=PER_EXIT),
    Case(
        "gpu_wide_statistics",
        *(4, 8192, 32000),
        dtype="bfloat16",
        family="statistics",
        formulations=PER_EXIT,
    ),
    *(
        Case(name, 1, *shape, "none", 1.0, dtype, "gate", formulations=GATES)
        for name, shape, dtype in (
            ("gpu_tiny_gate", (256, 10), "float32"),
            ("gpu_cifar100_gate", (65536, 100), "float32"),
            ("gpu_imagenet_gate_bf16", (65536, 1000), "bfloat16"),
            ("gpu_wide_gate_bf16", (8192, 32000), "bfloat16"),
        )
    ),
)

CASES: dict[str, Case] = {case.name: case for case in (*_LOSS, *_READ)}
CASES |= {case.name: Case(**{**vars(case), "device": "cuda"}) for case in _CUDA}


def select(names: list[str] | None = None, device: str = "cpu", quick: bool = False) -> list[Case]:
    """The cases of a device, in table order: all, the quick ones, or those named.

    A name may be a pattern (`imagenet*` also means `imagenet_bf16`).

    Raises: ValueError for a name that matches nothing.
    """
    pool = [c for c in CASES.values() if c.device == device and (c.quick or not quick)]
    if not names:
        return pool
    pool = [c for c in CASES.values() if c.device == device]
    for name in names:
        if not any(fnmatchcase(c.name, name) for c in pool):
            known = ", ".join(c.name for c in pool)
            raise ValueError(f"bench: case must be one of {known}; got {name!r}")
    return [c for c in pool if any(fnmatchcase(c.name, name) for name in names)]

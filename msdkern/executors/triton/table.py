# SPDX-License-Identifier: Apache-2.0
"""How many rows, warps and classes a program takes on: looked up, never tuned at run time."""

from __future__ import annotations

import functools
from typing import NamedTuple

THREADS = 32  # of a warp; AMD's have 64, so that a thread holds half as much there


class Plan(NamedTuple):
    """ROWS x BLOCK is a program's tile of each exit; resident if BLOCK holds all classes."""

    resident: bool
    rows: int
    block: int
    warps: int


# Warps of a program, and how many numbers of a row set [K, C] each of their threads may hold,
# where an exit counts ROW_NUMBERS besides its elements: x and its exponential are kept of each
# element, and some eight numbers per row. A thread has 255 registers, in a program of 16 warps
# 128. "general" are divergences that need one sweep more, pair by pair: the compiler takes all
# pairs of a student at once, with some eight numbers per element and pair in its hands.
RESIDENT = {
    "direct": ((4, 49), (8, 49), (16, 28)),
    "general": ((4, 21), (8, 21), (16, 17)),
}
ROW_NUMBERS = {"direct": 3, "general": 2}
RESIDENT_CLASSES = 4096
# Exits, up to which a sweep takes so many classes per step, with so many warps.
SWEEPS = {
    "direct": ((4, 2048, 8), (8, 1024, 8), (16, 512, 8), (64, 256, 8)),
    "general": ((4, 512, 8), (64, 256, 8)),
}
CLASSES_PER_WARP = 32  # at least, in a sweep
# More exits than so many, of which registers hold all, or one step of a sweep, are an axis of the
# tile, whether the formulas are O(K) or go pair by pair, whose code would grow with the square.
EXITS_APART = {"by exits": (16, 16), "by pairs": (8, 5)}
FEW_CLASSES = 256  # up to which so many exits as registers do not hold are such an axis, too
# Elements of such a tile, for so many warps.
STACKED = {"by exits": 2048, "by pairs": 1024}
STACKED_WARPS = 8
# The same for kernels that see one exit at a time.
ONE_EXIT = ((512, 4), (2048, 4), (8192, 8))
ONE_EXIT_SWEEP = (4096, 8)
# Classes of a row that a gate holds, with so many warps. In a sweep every thread keeps the findings
# of as many lanes as it loads classes at once, and has so many classes in hand.
GATE_HELD = ((1024, 4), (2048, 4), (4096, 8))
GATE_SWEEP_WARPS = 8
LOADED_AT_ONCE = 16  # bytes
GATE_SWEPT = 16


def power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


@functools.lru_cache(maxsize=4096)
def loss_plan(exits: int, classes: int, vector: int, kind: str, double: bool) -> Plan:
    """`exits` counts external teachers; `vector` is how many classes are loaded at once."""
    halved = 2 if double else 1
    block = max(vector, power_of_two(classes))
    # One row per thread: what is kept per row is then kept once.
    rows = max(1, THREADS * RESIDENT[kind][0][0] * vector // block)
    for warps, held in RESIDENT[kind] if block <= RESIDENT_CLASSES else ():
        each = held // (halved * exits) - ROW_NUMBERS[kind]  # elements of one exit, by a thread
        room = THREADS * warps * each
        while rows > 1 and rows * block > room:
            rows //= 2
        if block <= room:
            return Plan(True, rows, block, warps)
    step, warps = next((b, w) for most, b, w in SWEEPS[kind] if exits <= most)
    block = min(block, step // halved)
    return Plan(False, 1, block, max(1, min(warps, block // CLASSES_PER_WARP)))


@functools.lru_cache(maxsize=4096)
def stacks(exits: int, classes: int, vector: int, kind: str, way: str, double: bool) -> bool:
    """Whether exits are an axis of the tile: where they are many, or where few classes do not
    stay in registers, which would be swept in steps of a few numbers per thread."""
    resident = loss_plan(exits, classes, vector, kind, double).resident
    held, swept = EXITS_APART[way]
    return exits > held if resident else exits > swept or classes <= FEW_CLASSES


@functools.lru_cache(maxsize=4096)
def stacked_plan(exits: int, classes: int, way: str, double: bool) -> Plan:
    """`exits` counts external teachers."""
    width, most = power_of_two(exits), STACKED[way] // (2 if double else 1)
    block = max(1, min(most // width, power_of_two(classes)))
    return Plan(False, 1, block, max(1, STACKED_WARPS * block * width // STACKED[way]))


@functools.lru_cache(maxsize=4096)
def row_plan(classes: int, double: bool) -> Plan:
    """For kernels that see one exit at a time."""
    halved = 2 if double else 1
    block = power_of_two(classes)
    for most, warps in ONE_EXIT:
        if block * halved <= most:
            return Plan(True, max(1, ONE_EXIT[0][0] // (block * halved)), block, warps)
    block, warps = ONE_EXIT_SWEEP
    return Plan(False, 1, block // halved, warps)


class GatePlan(NamedTuple):
    """As Plan; a sweep reads `tiles` tiles at once."""

    resident: bool
    rows: int
    block: int
    warps: int
    tiles: int = 1


@functools.lru_cache(maxsize=4096)
def gate_plan(classes: int, element_size: int) -> GatePlan:
    """For gates, which see one exit at a time."""
    halved = 2 if element_size == 8 else 1
    block = power_of_two(classes)
    for most, warps in GATE_HELD:
        if block * halved <= most:
            return GatePlan(True, max(1, GATE_HELD[0][0] // (block * halved)), block, warps)
    threads, each = THREADS * GATE_SWEEP_WARPS, LOADED_AT_ONCE // element_size
    tiles = max(1, GATE_SWEPT // (halved * each))
    return GatePlan(False, 1, threads * each, GATE_SWEEP_WARPS, tiles)

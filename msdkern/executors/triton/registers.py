# SPDX-License-Identifier: Apache-2.0
"""How many registers a thread may have, where a kernel must not spill.

NVIDIA's assembler likes to stop at a number of registers that admits another program to the
processor, and parks the few numbers beyond it in memory. Told that very number as a limit, it
mostly does without the memory; else with a higher one. Which limit that is differs between
kernels, GPUs and assemblers, none serves all: so it is read from the binaries, once per
configuration, before its first launch. Nothing is timed, and no result changes by a bit: where
a number is kept is all that a limit decides.

A sweep waits for its loads unless another program has the processor meanwhile: it is given no
more registers than admit two, so long as it does not spill more for it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol, TypeVar

import torch

from .table import THREADS, Plan

MOST = 255  # of a thread
PER_PROCESSOR = 65536
BEYOND = (0, 8, 16, 32, 64, MOST)  # the number that spilled


class Binary(Protocol):
    """As Triton's CompiledKernel once it is loaded."""

    n_regs: int
    n_spills: int


B = TypeVar("B", bound=Binary)


def limits(registers: int, threads: int, resident: bool) -> list[int]:
    """What to try, in this order, for a program of `threads` that wants so many registers."""
    if not resident:
        return [min(registers, PER_PROCESSOR // (2 * threads))]
    most = min(MOST, PER_PROCESSOR // threads)
    return sorted({min(most, registers + more) for more in BEYOND})


def spill_free(build: Callable[..., B], threads: int, resident: bool) -> tuple[dict[str, int], B]:
    """The options `build` is to be given, and what it builds with them: the first that does not
    spill, nor is a sweep that is alone on its processor; or else that which spills least."""

    def faults(binary: B) -> tuple[int, bool]:
        return binary.n_spills, not resident and 2 * threads * binary.n_regs > PER_PROCESSOR

    options: dict[str, int] = {}
    best = build()
    for limit in limits(best.n_regs, threads, resident):
        if not any(faults(best)):
            break
        found = build(maxnreg=limit)
        if faults(found) < faults(best):
            options, best = {"maxnreg": limit}, found
    return options, best


_found: dict[Hashable, dict[str, int]] = {}


def options(
    key: Hashable, kernel: Any, grid: tuple[int, ...], arguments: Sequence[Any],
    constants: dict[str, Any], plan: Plan,
) -> dict[str, int]:  # fmt: skip
    """What a launch is given besides `constants`. `key` says what its binary depends on, but for
    alignments and the number of rows, which share what was found for the first."""
    found = _found.get(key)
    if found is None:

        def build(**limit: int) -> Any:
            compiled = kernel.warmup(*arguments, grid=grid, **constants, **limit)
            compiled._init_handles()  # loads it, which counts registers and spills
            return compiled

        found, _ = spill_free(build, plan.warps * THREADS, plan.resident)
        _found[key] = found
    return found


def limited(device: torch.device) -> bool:
    """Whether there is a limit to give: AMD's compiler takes none."""
    return device.type == "cuda" and torch.version.hip is None

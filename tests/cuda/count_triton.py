# SPDX-License-Identifier: Apache-2.0
"""Instructions per logit of the loss on executor `triton`, from the binaries it would launch."""

from __future__ import annotations

import dataclasses
import tempfile

import torch

from msdkern.executors.triton import launch
from tests.cuda.sass import Span, inside, instructions, loops
from tests.executors import aot

ROWS = 65536  # of the launch that is recorded: labels are counted by a launch before
THREADS = 32  # of a warp


@dataclasses.dataclass(frozen=True)
class Binary:
    """One program: instructions and exponentials of a thread, before the loops over classes and
    after them (`once`), and in all of these per step of `block` classes."""

    kernel: str
    resident: bool  # the row set is in registers: no loops
    rows: int
    block: int
    warps: int
    registers: int
    once: tuple[int, int]
    step: tuple[int, int]
    sweeps: int  # how often logits are read

    @property
    def threads(self) -> int:
        return THREADS * self.warps


def loss_launch(exits: int, classes: int, dtype: str, pair: str, divergence: str) -> aot.Launch:
    """The last launch of a mean loss over class indices, with all gradients."""
    z = [
        torch.empty(ROWS, classes, dtype=getattr(torch, dtype), device="meta") for _ in range(exits)
    ]
    y = torch.empty(ROWS, dtype=torch.int64, device="meta")
    weight = torch.empty(exits, exits, device="meta") if pair == "dense" else None
    one, t = torch.tensor(1.0, dtype=torch.float64), torch.tensor(3.0, dtype=torch.float64)
    return aot.launches(
        launch.multi_exit_loss, z, [], y, None, pair, weight, one, t, True, divergence, 0.5,
        True, None, -100, 0.0, "mean", None, False, [True] * exits,
    )[-1]  # fmt: skip


def binary(exits: int, classes: int, dtype: str, pair: str, divergence: str) -> Binary:
    """Compiles the launch for sm_90. What follows the ticket is done by one program in 64."""
    found = loss_launch(exits, classes, dtype, pair, divergence)
    compiled = aot.build(found, "sm_90")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        (code,) = instructions(file.name).values()
    end = next(address for address, text in code if text.startswith("ATOM"))
    all_of_it = Span.of(code, 0, end)
    given = found.arguments
    sweeps = [] if given["RESIDENT"] else _sweeps(code, end)
    # Where exits are met one by one, in a loop within the sweep, it is counted as often.
    partners = given["COUNT"] if found.kernel.__name__ == "stacked_kernel" else 1
    again = [(partners - 1, s) for s in _nested(code, end)] if sweeps else []
    step = [sum(s[name] for s in sweeps) for name in ("all", "MUFU.EX2")]
    met = [sum(times * s[name] for times, s in again) for name in ("all", "MUFU.EX2")]
    return Binary(
        found.kernel.__name__,
        bool(given["RESIDENT"]),
        given["ROWS"],
        given["BLOCK"],
        found.warps,
        aot.examine(compiled, "sm_90").registers,
        (all_of_it["all"] - step[0], all_of_it["MUFU.EX2"] - step[1]),
        (step[0] + met[0], step[1] + met[1]),
        max(1, len(sweeps)),
    )


def _busy(code: list[tuple[int, str]], end: int) -> list[Span]:
    found = [Span.of(code, first, last) for first, last in loops(code) if last < end]
    return [s for s in found if s["MUFU.EX2"]]


def _nested(code: list[tuple[int, str]], end: int) -> list[Span]:
    """The loops within sweeps: over the exits that each is compared with."""
    busy = _busy(code, end)
    return [s for outer in busy for s in inside(busy, outer)]


def _sweeps(code: list[tuple[int, str]], end: int) -> list[Span]:
    """The loops over classes."""
    nested = {(s.begin, s.end) for s in _nested(code, end)}
    return [s for s in _busy(code, end) if (s.begin, s.end) not in nested]

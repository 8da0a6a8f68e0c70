# SPDX-License-Identifier: Apache-2.0
"""Reading results: one view per case and phase, with the times found in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

PHASES = ("both", "forward", "backward")
RIVALS = ("naive", "eager", "compiled", "peer")


class Time(NamedTuple):
    """One contender's seconds per call."""

    name: str
    kind: str
    median: float
    low: float
    high: float


@dataclass(frozen=True)
class View:
    """All times of one case in one phase."""

    case: dict[str, Any]
    phase: str
    times: list[Time]
    left_out: dict[str, str]

    def best(self, *kinds: str) -> Time | None:
        """The fastest contender of these kinds, or None."""
        found = [time for time in self.times if time.kind in kinds]
        return min(found, key=lambda time: time.median, default=None)

    def named(self, name: str) -> Time | None:
        """A contender by name, or None."""
        return next((time for time in self.times if time.name == name), None)

    @property
    def ours(self) -> Time | None:
        """msdkern's fastest executor."""
        return self.best("msdkern")

    @property
    def rival(self) -> Time | None:
        """Whoever is fastest besides msdkern and the floor."""
        return self.best(*RIVALS)


def views(results: dict[str, Any], phase: str) -> list[View]:
    """The cases of a results file that have this phase."""
    found = [_view(entry, phase) for entry in results["cases"]]
    return [view for view in found if view.times]


def _view(entry: dict[str, Any], phase: str) -> View:
    times, left_out = [], {}
    for contender in entry["contenders"]:
        if "left_out" in contender:
            left_out[contender["name"]] = contender["left_out"]
        elif phase in contender["seconds"]:
            took = contender["seconds"][phase]
            spread = (took["median"], took["low"], took["high"])
            times.append(Time(contender["name"], contender["kind"], *spread))
    return View(entry["case"], phase, times, left_out)


def by_family(results: dict[str, Any], family: str, phase: str) -> list[View]:
    """The views of one family."""
    return [view for view in views(results, phase) if view.case["family"] == family]


def times_faster(ours: Time | None, rival: Time | None) -> str:
    """How many times faster than the rival, as text."""
    if ours is None or rival is None:
        return "-"
    ratio = rival.median / ours.median
    return f"{ratio:.{1 if ratio >= 1 else 2}f}x"

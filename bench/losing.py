# SPDX-License-Identifier: Apache-2.0
"""Where msdkern loses, computed from the results; no option leaves it out of a report."""

from __future__ import annotations

from typing import Any

from .reading import PHASES, RIVALS, View, views

FARTHEST = 3  # cases named as farthest from the floor


def where_we_lose(results: dict[str, Any]) -> str:
    """Every case and phase in which another contender is faster or needs less memory, and more."""
    everything = [view for phase in PHASES for view in views(results, phase)]
    lines = [*_slower(everything), *_missing(everything), *_more_memory(results)]
    lines += _undecided(everything)
    lines += _farthest([view for view in everything if view.phase != "backward"])
    return "\n".join(f"- {line}" for line in lines)


def _slower(everything: list[View]) -> list[str]:
    leads = []
    for view in everything:
        ours, rival = view.ours, view.rival
        if ours is None or rival is None:
            continue
        leads.append((rival.median / ours.median, view, rival.name))
    if not leads:
        return ["Nothing was measured against another contender."]
    leads.sort(key=lambda item: item[0])
    lost = [
        f"Slower than *{name}* in {_label(view)}: {1 / lead:.2f}x its time."
        for lead, view, name in leads
        if lead < 1
    ]
    if lost:
        return lost
    lead, view, name = leads[0]
    smallest = f"the smallest lead is {lead:.2f}x over *{name}* in {_label(view)}"
    return [f"Slower nowhere in this run; {smallest}."]


def _missing(everything: list[View]) -> list[str]:
    reasons = {
        f"Left out in `{view.case['name']}`: *{name}*: {why}."
        for view in everything
        for name, why in view.left_out.items()
        if name.startswith("msdkern")
    }
    return sorted(reasons)


def _more_memory(results: dict[str, Any]) -> list[str]:
    lines = []
    for entry in results["cases"]:
        sizes = {
            kind: min((c["peak_bytes"], c["name"]) for c in found)
            for kind, found in _measured(entry).items()
            if found
        }
        if "ours" in sizes and "rivals" in sizes and sizes["ours"][0] > sizes["rivals"][0]:
            (ours, _), (least, name) = sizes["ours"], sizes["rivals"]
            more = f"{(ours - least) / 1e6:.2g} MB more, {ours / max(1, least):.2f}x its peak"
            lines.append(f"More memory than *{name}* in `{entry['case']['name']}`: {more}.")
    return lines


def _measured(entry: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    found = [c for c in entry["contenders"] if "peak_bytes" in c]
    return {
        "ours": [c for c in found if c["kind"] == "msdkern"],
        "rivals": [c for c in found if c["kind"] in RIVALS],
    }


def _undecided(everything: list[View]) -> list[str]:
    """Leads that the spread of this run does not settle."""
    names = [
        _label(view)
        for view in everything
        if (ours := view.ours)
        and (rival := view.rival)
        and ours.median <= rival.median
        and ours.high > rival.low
    ]
    return [f"Leads within the spread of this run: {', '.join(names)}."] if names else []


def _farthest(everything: list[View]) -> list[str]:
    shares = [
        (floor.median / ours.median, view)
        for view in everything
        if (ours := view.ours) and (floor := view.best("floor"))
    ]
    shares.sort(key=lambda item: item[0])
    worst = [f"{_label(view)} ({100 * share:.0f}%)" for share, view in shares[:FARTHEST]]
    return [f"Farthest from the copy: {', '.join(worst)}."] if worst else []


def _label(view: View) -> str:
    phase = {"both": "forward and backward"}.get(view.phase, view.phase)
    return f"`{view.case['name']}` {phase}"

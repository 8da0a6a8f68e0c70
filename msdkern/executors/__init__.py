# SPDX-License-Identifier: Apache-2.0
"""Who computes: the registry of ops x executors, the choice between them, and the reasons.

An executor is a module with one function per op it serves, named like the op, and `reason()`:
None when it can run here, else one sentence. Executors are probed on first use; the answer and
its reason are kept.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

from msdkern.executors import order

# Module of each executor, and the device type it serves (its own `device_type` may say otherwise).
EXECUTORS = {
    "eager": ("msdkern.executors.eager", None),
    "cpu": ("msdkern.executors.native", "cpu"),
    "cuda": ("msdkern.executors.cuda", "cuda"),
    "triton": ("msdkern.executors.triton", "cuda"),
}
# Which executor is tried first on which device; any other device gets `eager`. Of a GPU's, the
# table of order.py says for losses which is first; else it is `cuda`, whose kernels keep larger row
# sets on chip and need not be compiled when they are first called.
PREFERENCE = {"cpu": ("cpu", "eager"), "cuda": ("cuda", "triton", "eager")}

_forced: str | None = os.environ.get("MSDKERN_EXECUTOR") or None


@functools.cache
def _module(name: str) -> Any:
    return importlib.import_module(EXECUTORS[name][0])


@functools.cache
def reason(name: str) -> str | None:
    """Why the executor cannot run on this machine, or None when it can."""
    return _module(name).reason()


def device_type(name: str) -> str | None:
    """The device type that an executor serves here; None for any. ROCm's is "cuda" as well."""
    of_module = getattr(_module(name), "device_type", None)
    return EXECUTORS[name][1] if of_module is None else of_module()


def _missing(op: str, name: str) -> str | None:
    return None if hasattr(_module(name), op) else f"executor {name!r} does not serve {op}"


def _refusal(op: str, name: str, device: str) -> str | None:
    """Why this executor cannot serve this op on this device, or None."""
    if name not in EXECUTORS:
        return f"unknown executor {name!r} (known: {', '.join(EXECUTORS)})"
    serves = device_type(name)
    if serves not in (None, device):
        return f"executor {name!r} serves {serves} tensors; got {device}"
    return reason(name) or _missing(op, name)


def _order(device: str, shape: order.Shape | None) -> tuple[str, ...]:
    """The executors in the order in which they are tried."""
    names = PREFERENCE.get(device, ("eager",))
    region = order.region_of(device, shape)
    return names if region is None else (region.first, *(n for n in names if n != region.first))


@functools.lru_cache(maxsize=4096)
def _decide(
    op: str, device: str, forced: str | None, shape: tuple[str, int, int] | None = None
) -> tuple[str, str | None]:
    """The executor that serves, and why it cannot where it was forced."""
    if forced is not None:
        return forced, _refusal(op, forced, device)
    names = _order(device, None if shape is None else order.Shape(*shape))
    return next(name for name in names if _refusal(op, name, device) is None), None


@torch.compiler.assume_constant_result  # probing imports modules, which cannot be traced
def _serve(
    op: str, device: str, forced: str | None, shape: tuple[str, int, int] | None
) -> tuple[str, str | None]:
    return _decide(op, device, forced, shape)


def select(op: str, device: str, logits: Any = None, given: Any = None) -> str:
    """The executor for this op on this device type; for a loss, of these logits and arguments. An
    explicit choice never falls back."""
    shape = None
    if given is not None and _forced is None and device in order.REGIONS:
        shape = order.shape_of(logits, given)
    name, refusal = _serve(op, device, _forced, shape)
    if refusal is not None:
        raise RuntimeError(f"{op}: the executor that was asked for cannot serve; {refusal}")
    return name


@functools.cache
def implementation(op: str, name: str) -> Callable[..., Any]:
    """The executor's function for a registered op."""
    return getattr(_module(name), op)


# What an argument of an op may be for its executor to be called at once, without the dispatcher.
_PLAIN_TENSORS = frozenset((torch.Tensor, torch.nn.Parameter))
VALUES = frozenset((str, bool, int, float, type(None)))
_PLAIN = _PLAIN_TENSORS | VALUES | {list, tuple}


def _plain(arguments: tuple[Any, ...]) -> bool:
    """All are ordinary values, and tensors ordinary ones."""
    if not _PLAIN.issuperset(map(type, arguments)):
        return False
    for a in arguments[:4]:
        if type(a) in (list, tuple) and not _PLAIN_TENSORS.issuperset(map(type, a)):
            return False
    return True


def _unobserved() -> bool:
    """Nothing looks at the ops that run: no mode, tracer, transform or profiler."""
    return not (
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd._profiler_enabled()
    )


def call(name: str, *arguments: Any) -> Any:
    """The registered op msdkern::name; arguments in the order of its schema, tensors first.

    Where nothing observes the call and all tensors are ordinary ones, the dispatcher would do no
    more than call the executor, for about a tenth of what a small batch costs; it is left out.
    """
    if not torch.compiler.is_compiling() and _plain(arguments) and _unobserved():
        return implementation(name, arguments[-1])(*arguments[:-1])
    return getattr(torch.ops.msdkern, name).default(*arguments)


@contextlib.contextmanager
def executor(name: str) -> Iterator[None]:
    """Make every op inside the block run on this executor, or raise if it cannot serve.

    Process-wide. The environment variable MSDKERN_EXECUTOR sets the choice from the start.
    """
    global _forced
    if name not in EXECUTORS:
        known = ", ".join(EXECUTORS)
        raise ValueError(f"executor: name must be one of {known}; got {name!r}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


OPS = (
    "multi_exit_loss",
    "multi_exit_row_losses",
    "multi_exit_softmax",
    "exit_statistics",
    "exit_gate",
    "gate_step",
    "compact_rows",
    "scatter_rows",
)


def table() -> dict[str, dict[str, str | None]]:
    """op -> executor -> None when available, else the reason why not."""
    return {op: {name: reason(name) or _missing(op, name) for name in EXECUTORS} for op in OPS}


def shapes() -> list[str]:
    """By the losses' kind and size, who is first where several executors serve a device."""
    lines = []
    for device, regions in order.REGIONS.items():
        several = [n for n in PREFERENCE[device] if n != "eager" and reason(n) is None]
        if len(several) > 1:
            lines.append(f"first for losses on {device} ({order.BASIS}):")
            lines += [f"  {r.extent}: {r.first}" for r in regions]
    return lines


def explain() -> str:
    """The table op x executor as text: available, or the reason why not; and who is first for which
    losses, where there is a choice."""
    rows = [f"{'op':<24}" + "".join(f"{name:<12}" for name in EXECUTORS)]
    for op, cells in table().items():
        marks = ("available" if why is None else "no" for why in cells.values())
        rows.append(f"{op:<24}" + "".join(f"{mark:<12}" for mark in marks))
    rows += [f"{name}: {why}" for name in EXECUTORS if (why := reason(name))]
    rows += shapes()
    if _forced is not None:
        rows.append(f"executor {_forced!r} was asked for; nothing else will serve")
    return "\n".join(line.rstrip() for line in rows)

# SPDX-License-Identifier: Apache-2.0
"""The methods of the literature as rows of one table: settings of `MultiExitLoss`.

A row is a function from the number of exits (and the method's own options) to settings; its
docstring is the formula and the source, printed by `describe`. In the formulas p = softmax(z),
q = softmax(z / T), sg[.] is detached, means are over rows, and exits count from 1 to K.

Methods of the same family that are not rows, and why:

- DSN, MSDNet, BranchyNet, RANet: `ce`. EE-LLM and the early-exit curricula of LayerSkip: `ce` or
  `layerskip` with `exit_weight` per call; EE-LLM's per-exit temperature divides the logits first.
- L2W-DEN, JEI-DNN (classifier part): `ce` with `exit_weight` [K, N] per call. Their meta step
  needs second-order gradients, which `multi_exit_loss` refuses: write that step in PyTorch.
- DepS and US-Nets: the loss of `slimmable`. SN-Net: the loss of `deit`. DeiT's hard variant is
  `ce` with the teacher's argmax as target.
- EKD, BD-KD and MATE: their coefficients are not in the public material. BD-KD is
  `multi_exit_loss` with `pair_weight` [K, K + E, N]; MATE is `mlcsd` with other teachers.
- DistiLLM: its skew divergence KL(p_t || a p_t + (1 - a) p_s) is none of the four divergences.
- AKL (sorts the teacher), DIST (couples the batch), IMTA's gradient equilibrium (scales feature
  gradients), WIN and other representation losses: not losses of the logits' rows.
- DML, ONE: the networks, or the gate, are yours; here are the losses of their logits.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from msdkern.nn import self_distillation as own
from msdkern.nn import teachers
from msdkern.nn.dkd import DKDLoss
from msdkern.nn.losses import MSDLoss, MultiExitLoss
from msdkern.nn.self_distillation import Settings

PRESETS: dict[str, Callable[..., Settings]] = {
    row.__name__: row
    for row in (
        own.ce, own.deebert, own.pabee, own.sdn, own.layerskip,
        own.msd, own.dks, own.dml, own.byot, own.byot_journal, own.scan, own.phuong_lampert,
        own.ztw_last, own.ztw_all, own.ztw_next, own.fastbert, own.slimmable, own.hdkd,
        teachers.one, teachers.exit_ensemble, teachers.mlcsd, teachers.imta, teachers.kd,
        teachers.dkd, teachers.ofa, teachers.deit, teachers.gkd,
    )
}  # fmt: skip

# Rows that are not plain settings of MultiExitLoss.
CLASSES: dict[str, type[MultiExitLoss]] = {"msd": MSDLoss, "dkd": DKDLoss}


def create(name: str, exits: int, **options: Any) -> MultiExitLoss:
    """The criterion of a published method: ``criterion(logits, target, features=None) -> scalar``.

    Args:
        name: one of `names()`; `describe(name)` prints its formula, source and options.
        exits: K, the number of exits.
        options: the method's own options, and any setting of `MultiExitLoss`, which then
            replaces the method's (``ignore_index``, ``label_smoothing``, ``reduction``, ...).

    Raises:
        ValueError: for an unknown name or fewer than one exit.
        TypeError: for an unknown option.
    """
    row = _row(name)
    if exits < 1:
        raise ValueError(f"create: exits must be at least 1; got {exits}")
    kind = CLASSES.get(name, MultiExitLoss)
    methods, general = _options(row), _settings(kind)
    unknown = [key for key in options if key not in methods and key not in general]
    if unknown:
        known = ", ".join(dict.fromkeys([*methods, *general]))
        raise TypeError(f"create: {name} takes {known}; got {', '.join(unknown)}")
    settings = row(exits, **{key: options[key] for key in options if key in methods})
    others = {key: options[key] for key in options if key not in methods}
    return kind(**{**settings, **others})


def names() -> tuple[str, ...]:
    """The names that `create` knows."""
    return tuple(PRESETS)


def describe(name: str) -> str:
    """Formula, source and options of a preset, as text."""
    row = _row(name)
    options = ", ".join(f"{key}={value!r}" for key, value in _options(row).items())
    return f"{name}: {inspect.cleandoc(row.__doc__ or '')}\nOptions: {options or 'none'}\n"


def _row(name: str) -> Callable[..., Settings]:
    if name not in PRESETS:
        raise ValueError(f"create: name must be one of {', '.join(PRESETS)}; got {name!r}")
    return PRESETS[name]


def _options(row: Callable[..., Settings]) -> dict[str, Any]:
    parameters = list(inspect.signature(row).parameters.values())[1:]
    return {p.name: p.default for p in parameters}


def _settings(kind: type) -> tuple[str, ...]:
    """What the class takes by keyword; MSDLoss hands the rest on to MultiExitLoss."""
    named = inspect.signature(kind).parameters
    passed_on = inspect.signature(MultiExitLoss).parameters if "options" in named else {}
    return tuple(key for key in {**named, **passed_on} if key != "options")

# SPDX-License-Identifier: Apache-2.0
"""Rows of the table of methods: label losses, and exits that teach each other.

A row maps the number of exits and the method's own options to settings of `MultiExitLoss`. Its
docstring is the formula and the source; the notation is that of msdkern/nn/presets.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

Settings = dict[str, Any]


def but_last(exits: int, others: float, last: float) -> list[float]:
    """One weight for every exit but the deepest."""
    return [others] * (exits - 1) + [last]


# Label losses ---------------------------------------------------------------------------------


def ce(exits: int) -> Settings:
    """sum_k CE_k

    Deep supervision: DSN (Lee et al. 2015), BranchyNet (Teerapittayanon et al. 2016), MSDNet
    (Huang et al. 2018), RANet (Yang et al. 2020). Other weights: exit_weight=[...].
    """
    return {}


def deebert(exits: int) -> Settings:
    """sum_{k<K} CE_k

    DeeBERT (Xin et al. 2020), second stage: the trunk and the last exit are frozen by the user.
    """
    return {"exit_weight": but_last(exits, 1.0, 0.0)}


def pabee(exits: int) -> Settings:
    """sum_k k CE_k / sum_k k

    PABEE (Zhou et al. 2020).
    """
    total = exits * (exits + 1) / 2
    return {"exit_weight": [k / total for k in range(1, exits + 1)]}


def sdn(exits: int, largest: float = 0.9) -> Settings:
    """CE_K + sum_{k<K} w_k(t) CE_k,  w_k(t) = min(m_k, 0.01 + t m_k),  m_k = largest k / (K - 1)

    Shallow-Deep Networks (Kaya et al. 2019): weights grow with progress t (`set_progress`), up
    to 0.15, 0.3, ..., 0.9 for six early exits.
    """
    maxima = [largest * k / max(exits - 1, 1) for k in range(1, exits)]
    schedule = partial(_sdn_weights, maxima=tuple(maxima))
    return {**schedule(0.0), "schedule": schedule}


def _sdn_weights(progress: float, maxima: Sequence[float]) -> dict[str, list[float]]:
    return {"exit_weight": [min(m, 0.01 + progress * m) for m in maxima] + [1.0]}


LAYER_SCALES: dict[str, Callable[[int], float]] = {
    "uniform": lambda layer: 1.0,
    "linear": lambda layer: layer + 1.0,
    "sum": lambda layer: (layer + 1.0) * (layer + 2.0) / 2.0,
    "sqrt": lambda layer: math.sqrt(layer + 1.0),
    "inverse": lambda layer: 1.0 / (layer + 1.0),
    "inverse_sqrt": lambda layer: 1.0 / math.sqrt(layer + 1.0),
}


def layerskip(exits: int, scale: str = "sum", early_scale: float = 1.0) -> Settings:
    """sum_l s_l CE_l,  sum_l s_l = 1,  s_l ~ f(l), times early_scale except for the last

    LayerSkip (Elhoushi et al. 2024). f: uniform 1, linear l + 1, sum 1 + ... + (l + 1), sqrt,
    inverse, inverse_sqrt of l + 1, for l = 0 .. K - 1. Mean over tokens that are not ignored.
    """
    if scale not in LAYER_SCALES:
        rule = f"layerskip: scale must be one of {', '.join(LAYER_SCALES)}"
        raise ValueError(f"{rule}; got {scale!r}")
    weight = [LAYER_SCALES[scale](layer) for layer in range(exits)]
    weight = [w * early_scale for w in weight[:-1]] + weight[-1:]
    return {"exit_weight": [w / sum(weight) for w in weight]}


# Exits teach each other -----------------------------------------------------------------------


def msd(
    exits: int,
    alpha: float = 0.1,
    temperature: float = 3.0,
    beta_begin: float = 1e-4,
    beta_end: float = 0.0,
) -> Settings:
    """(1 - alpha) sum_k CE_k + alpha / (K - 1) sum_i sum_{j!=i} T^2 KL(sg[q_j] || q_i)
    + beta_t sum_{i<K} mean ||F_i - sg[F_K]||^2

    MSD (Luan et al. 2019, 1911.09418); beta_t anneals from beta_begin to beta_end by half a
    cosine (`set_progress`). What the text leaves open: see `msdkern.nn.MSDLoss`. The values are
    those of the first author's BYOT code (beta: 1e-6 on a sum over a batch of 128).
    """
    return {
        "alpha": alpha,
        "temperature": temperature,
        "beta_begin": beta_begin,
        "beta_end": beta_end,
    }


def dks(exits: int) -> Settings:
    """sum_i [ CE_i + sum_{j!=i} KL(sg[p_j] || p_i) ]

    Deeply-supervised Knowledge Synergy (Sun et al. 2019): every ordered pair, weight 1, T = 1.
    """
    return {"pair_weight": "mutual", "pair_scale": float(max(exits - 1, 0))}


def dml(exits: int, average: bool = False) -> Settings:
    """sum_i [ CE_i + sum_{j!=i} KL(sg[p_j] || p_i) ];  average=True: peers weigh 1 / (K - 1)

    Deep Mutual Learning (Zhang et al. 2018): the "exits" are the logits of K networks. The
    official code adds the peers; it also smooths labels (label_smoothing=...).
    """
    return {"pair_weight": "mutual", "pair_scale": 1.0 if average else float(max(exits - 1, 0))}


def byot(exits: int, alpha: float = 0.1, temperature: float = 3.0, beta: float = 1e-6) -> Settings:
    """(1 - alpha) sum_k CE_k - alpha T^2 sum_{i<K} mean sum_c sg[q_K] log q_i
    + beta sum_{i<K} sum m (F_i - sg[F_K])^2,  m = 1 where F_i > 0 or F_K > 0

    Be Your Own Teacher (Zhang et al. 2019), as in the code of MSD's first author. Soft cross
    entropy: the teacher's entropy is part of the value. The feature term is a SUM over rows and
    components, hence the small beta.
    """
    return {
        "exit_weight": 1.0 - alpha,
        "pair_weight": "last",
        "pair_scale": alpha,
        "temperature": temperature,
        "divergence": "soft_ce",
        "feature_weight": beta,
        "feature_reduction": "sum",
        "feature_relu_mask": True,
    }


def byot_journal(
    exits: int, alpha: float = 0.3, temperature: float = 3.0, beta: float = 0.03
) -> Settings:
    """CE_K + sum_{i<K} [ (1 - alpha) CE_i - alpha mean sum_c sg[q_K] log q_i ]
    + beta sum_{1<i<K} ||F_i - sg[F_K]||

    Self-Distillation (Zhang et al., TPAMI 2021), as in the authors' code: no T^2; the feature
    term is the L2 norm, not squared, of the whole batch, without the shallowest exit.
    """
    return {
        "exit_weight": but_last(exits, 1.0 - alpha, 1.0),
        "pair_weight": "last",
        "pair_scale": alpha,
        "temperature": temperature,
        "temperature_squared": False,
        "divergence": "soft_ce",
        "feature_weight": beta,
        "feature_reduction": "norm",
        "feature_exit_weight": ([0.0] + [1.0] * exits)[: exits - 1],
    }


def scan(exits: int, alpha: float = 0.5, temperature: float = 3.0, beta: float = 5e-7) -> Settings:
    """CE_K + sum_{i<K} [ (1 - alpha) CE_i - alpha T^2 mean sum_c sg[q_K] log q_i ]
    + beta sum_{i<K} sum (F_i - sg[F_K])^2

    SCAN (Zhang et al., NeurIPS 2019), as in the authors' code (alpha is its lambda).
    """
    return {
        "exit_weight": but_last(exits, 1.0 - alpha, 1.0),
        "pair_weight": "last",
        "pair_scale": alpha,
        "temperature": temperature,
        "divergence": "soft_ce",
        "feature_weight": beta,
        "feature_reduction": "sum",
    }


def phuong_lampert(
    exits: int,
    alpha: float = 0.5,
    scale: float | None = None,
    temperature: float = 1.0,
    adaptive: bool = True,
    bound: float = 0.5,
    factor: float = 1.05,
) -> Settings:
    """s [ (1 - alpha) sum_k CE_k - alpha T^2 sum_{i<K} mean sum_c sg[q_K] log q_i ]

    Distillation-based training of multi-exit architectures (Phuong & Lampert 2019); alpha is its
    C, s = 10 / K unless given. adaptive: after each step T is multiplied by the factor when the
    mean over rows of max_c q_K exceeds the bound, on the device. For the constant variant:
    temperature=4, adaptive=False.
    """
    s = 10.0 / exits if scale is None else scale
    return {
        "exit_weight": s * (1.0 - alpha),
        "pair_weight": "last",
        "pair_scale": s * alpha,
        "temperature": temperature,
        "divergence": "soft_ce",
        "adapt_temperature": (bound, factor) if adaptive else None,
    }


def ztw_last(exits: int, weight: float = 1.0) -> Settings:
    """1/K sum_k CE_k - weight / (K - 1) sum_{i<K} mean sum_c sg[p_K] log p_i

    Zero Time Waste (Wojcik et al. 2023): the deepest exit teaches every earlier one.
    """
    return _ztw(exits, "last", weight / max(exits - 1, 1))


def ztw_all(exits: int, weight: float = 1.0) -> Settings:
    """1/K sum_k CE_k - weight 2 / (K (K - 1)) sum_{i<j} mean sum_c sg[p_j] log p_i

    Zero Time Waste: every later exit teaches every earlier one, mean over pairs.
    """
    pairs = max(exits * (exits - 1) / 2, 1)
    return _ztw(exits, torch.ones(exits, exits).triu(1), weight / pairs)


def ztw_next(exits: int, weight: float = 1.0) -> Settings:
    """1/K sum_k CE_k - weight / (K - 1) sum_{i<K} mean sum_c sg[p_{i+1}] log p_i

    Zero Time Waste: the next exit teaches the one before.
    """
    return _ztw(exits, "next", weight / max(exits - 1, 1))


def _ztw(exits: int, pairs: str | Tensor, scale: float) -> Settings:
    return {
        "exit_weight": 1.0 / exits,
        "pair_weight": pairs,
        "pair_scale": scale,
        "divergence": "soft_ce",
    }


def fastbert(exits: int) -> Settings:
    """sum_{i<K} KL(sg[p_K] || p_i)

    FastBERT (Liu et al. 2020), second stage: no labels (target=None; with a target, ignored rows
    are left out and cross entropies are reported, not trained). The last exit is frozen.
    """
    return {"exit_weight": 0.0, "pair_weight": "last"}


def slimmable(exits: int) -> Settings:
    """CE_K - sum_{i<K} mean sum_c sg[p_K] log p_i

    The sandwich rule of universally slimmable networks (Yu & Huang 2019), also DepS: exits are
    sub-networks of one step, the widest last; only that one sees labels.
    """
    return {
        "exit_weight": but_last(exits, 0.0, 1.0),
        "pair_weight": "last",
        "divergence": "soft_ce",
    }


def hdkd(
    exits: int,
    label_weight: Sequence[float] | None = None,
    pair_weight: Tensor | None = None,
    temperature: float = 1.0,
) -> Settings:
    """sum_i w_i CE_i + sum_i sum_{j>i} lambda_ij T^2 KL(sg[q_j] || q_i)

    HDKD (Wang & Li, AAAI 2021). w and lambda (upper triangle, default ones) are learned outside,
    from `.terms["cross_entropy"]` [K] and `.terms["pair_divergence"]` [K, K], the gradients of
    the loss with respect to them (times T^2 for the pairs). T is not stated; 1 here.
    """
    ones = torch.ones(exits, exits)
    return {
        "exit_weight": label_weight,
        "pair_weight": (ones if pair_weight is None else pair_weight).triu(1),
        "temperature": temperature,
        "pair_divergence": True,
    }

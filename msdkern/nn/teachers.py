# SPDX-License-Identifier: Apache-2.0
"""Rows of the table of methods: exits that are taught from outside, or by their ensemble.

A row maps the number of exits and the method's own options to settings of `MultiExitLoss`. Its
docstring is the formula and the source; the notation is that of msdkern/nn/presets.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from msdkern.nn.self_distillation import Settings, but_last


def _external(exits: int, students: Sequence[float] | None = None) -> Tensor:
    """W [K, K + 1]: one external teacher with a weight per student, default 1."""
    weight = torch.zeros(exits, exits + 1)
    weight[:, exits] = 1.0 if students is None else torch.tensor(students)
    return weight


def one(exits: int, weight: float = 1.0, temperature: float = 3.0, ramp: float = 0.0) -> Settings:
    """sum_k CE_k + CE(z_e) + w(t) T^2 sum_k KL(sg[q_e] || q_k)

    ONE (Lan et al. 2018). teacher_logits=[z_e], the gated sum of the branches' logits; the gate
    is yours and is trained by CE(z_e), so `.terms` hold K + 1 exits. w(t) = weight, or
    weight exp(-5 (1 - t / ramp)^2) until progress t reaches ramp (80 of 300 epochs there).
    """
    settings = {"pair_weight": "last", "temperature": temperature, "teacher": "exit"}
    return {**settings, **_ramped(partial(_sigmoid_ramp, weight=weight, length=ramp))}


def _ramped(schedule: Callable[[float], dict[str, float]]) -> Settings:
    return {**schedule(0.0), "schedule": schedule}


def _sigmoid_ramp(progress: float, weight: float, length: float) -> dict[str, float]:
    rest = 1.0 - progress / length if progress < length else 0.0
    return {"pair_scale": weight * math.exp(-5.0 * rest * rest)}


def exit_ensemble(
    exits: int, alpha: float = 0.1, temperature: float = 3.0, beta: float = 1.0
) -> Settings:
    """sum_k CE_k - alpha T^2 sum_k mean sum_c sg[q_e] log q_k
    + beta sum_k mean m (F_k - sg[mean_j F_j])^2,  z_e = mean_j z_j,  m as in byot

    Exit-Ensemble Distillation (Lee & Lee 2021), with its soft-label option; the code's default, a
    squared error of logits, is not a divergence of probabilities. Features: mean over rows and
    components.
    """
    return {
        "pair_weight": _external(exits),
        "pair_scale": alpha,
        "temperature": temperature,
        "divergence": "soft_ce",
        "teacher": "ensemble",
        "feature_weight": beta,
        "feature_reduction": "elementmean",
        "feature_imitate": "mean",
        "feature_relu_mask": True,
    }


def mlcsd(exits: int, alpha: float = 9.0, gamma: float = 1.0, temperature: float = 4.0) -> Settings:
    """CE_K + gamma sum_{i<K} CE_i + alpha T^2 sum_i KL(sg[q(e_i)] || q_i)

    MLCSD-Net: teacher_logits = K tensors, e_i the attention-weighted sum of all exits' logits for
    exit i, made (and detached) by you. The hint term on features stays outside as well.
    """
    return {
        "exit_weight": but_last(exits, gamma, 1.0),
        "pair_weight": torch.cat([torch.zeros(exits, exits), torch.eye(exits)], dim=1),
        "pair_scale": alpha,
        "temperature": temperature,
    }


def imta(exits: int, gamma: float = 0.9, temperature: float = 3.0) -> Settings:
    """CE_K + sum_{i<K} [ (1 - gamma) CE_i + gamma T^2 / C KL(sg[q_t] || q_i) ]

    IMTA (Li et al. 2019), one-for-all stage; teacher_logits=[z_t] are the last logits of the
    frozen first-stage network. The KL is a mean over rows AND classes, as released; the ImageNet
    script has gamma = 0.1, T = 1.
    """
    return {
        "exit_weight": but_last(exits, 1.0 - gamma, 1.0),
        "pair_weight": _external(exits, but_last(exits, 1.0, 0.0)),
        "pair_scale": gamma,
        "temperature": temperature,
        "pair_mean": "elements",
    }


def kd(exits: int, alpha: float = 0.1, beta: float = 0.9, temperature: float = 4.0) -> Settings:
    """sum_k [ alpha CE_k + beta T^2 KL(sg[q_t] || q_k) ]

    Knowledge distillation (Hinton et al. 2015) of every exit from teacher_logits=[z_t].
    """
    return {
        "exit_weight": alpha,
        "pair_weight": _external(exits),
        "pair_scale": beta,
        "temperature": temperature,
    }


def dkd(
    exits: int,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    warmup: float = 0.0,
) -> Settings:
    """sum_k [ CE_k + w(t) T^2 (alpha KL(b_t || b_k) + beta KL(r_t || r_k)) ]

    Decoupled KD (Zhao et al. 2022) of every exit from teacher_logits=[z_t]: b = (q[y], 1 - q[y]),
    r = q without the target, renormalised. C > 2. w(t) rises linearly to 1 at progress warmup.
    See `msdkern.nn.DKDLoss`.
    """
    return {"alpha": alpha, "beta": beta, "temperature": temperature, "warmup": warmup}


def ofa(exits: int, weight: float = 1.0, smoothing: float = 0.1) -> Settings:
    """sum_k [ CE_k(smoothed labels) - weight mean sum_c sg[p_t] log p_k ]

    Once-for-all (Cai et al. 2020): exits are sub-networks, teacher_logits=[z_t] the full network.
    """
    return {
        "pair_weight": _external(exits),
        "pair_scale": weight,
        "divergence": "soft_ce",
        "label_smoothing": smoothing,
    }


def deit(exits: int, alpha: float = 0.5, temperature: float = 1.0) -> Settings:
    """sum_k [ (1 - alpha) CE_k + alpha T^2 / C KL(sg[q_t] || q_k) ]

    Soft distillation of DeiT (Touvron et al. 2021) and SN-Net (Pan et al. 2023) from
    teacher_logits=[z_t]; the KL is a mean over rows AND classes, the target may be soft (Mixup).
    """
    return {
        "exit_weight": 1.0 - alpha,
        "pair_weight": _external(exits),
        "pair_scale": alpha,
        "temperature": temperature,
        "pair_mean": "elements",
    }


def gkd(exits: int, beta: float = 0.5) -> Settings:
    """sum_k JSD_beta(p_t, p_k) = beta KL(p_t || m) + (1 - beta) KL(p_k || m),
    m = beta p_t + (1 - beta) p_k

    Generalised KD of language models (Agarwal et al. 2024) from teacher_logits=[z_t]: mean over
    tokens that are not ignored, T = 1, no labels. beta = 0 is forward and beta = 1 reverse KL.
    """
    return {
        "exit_weight": 0.0,
        "pair_weight": _external(exits),
        "divergence": "jsd",
        "beta": beta,
    }

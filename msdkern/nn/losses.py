# SPDX-License-Identifier: Apache-2.0
"""Loss modules for multi-exit networks: `msdkern.multi_exit_loss` with its options stored.

`MultiExitLoss` is the general criterion; the methods of the literature are settings of it, rows
of the table in msdkern/nn/presets.py. `MSDLoss` is equation (8) by the names of its own text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from msdkern import ops
from msdkern.nn.features import REDUCTIONS, TARGETS, anneal, feature_loss

Number = float | Tensor
Schedule = Callable[[float], Mapping[str, Any]]

# Who the external teachers are, given the exits and the `teacher_logits` of the call. Each entry
# returns (logits, teachers).
TEACHERS: dict[str, Callable[[Any, Any], tuple[Any, Any]]] = {
    # teachers as passed in; they receive no gradient
    "external": lambda logits, teachers: (logits, teachers),
    # one teacher: the mean of all exits' logits, detached (exit-ensemble distillation)
    "ensemble": lambda logits, teachers: (logits, [sum(z.detach() for z in logits) / len(logits)]),
    # the teacher is trained too: it joins the exits as the deepest one (ONE)
    "exit": lambda logits, teachers: ([*logits, *teachers], None),
}


class MultiExitLoss(nn.Module):
    """Cross entropy of every exit, divergences between exits, and a feature term.

    ::

        L = multi_exit_loss(logits, target, ...).loss + feature_weight * feature_loss(features)

    ``criterion(logits, target, features=None, teacher_logits=None)`` returns a differentiable
    scalar; see `msdkern.multi_exit_loss` for the formula, shapes, dtypes, ignored rows, and for
    who receives gradient. An exit whose weights are zero gets a zero gradient, not None.

    Settings that may change during training (temperature, weights) live in buffers: assigning a
    number to `temperature` or calling `set_progress` recompiles nothing under `torch.compile`.

    Args:
        exit_weight: a, a number for all exits, or [K], or [K, N]; default 1.
        pair_weight: W, a name or a tensor [K, K + E], as in `multi_exit_loss`.
        pair_scale, temperature, temperature_squared, divergence, beta, detach_teacher,
        class_weight, ignore_index, label_smoothing, reduction, pair_divergence: as in
            `multi_exit_loss`. A temperature given as a 0-d tensor is kept, not copied.
        pair_mean: "rows" divides the divergences of a batch by its rows (KL "batchmean");
            "elements" also by C, as the default reduction of `nn.KLDivLoss` does (IMTA, DeiT).
        teacher: "external", "ensemble" or "exit": see TEACHERS above.
        feature_weight: beta, multiplies the feature term; features are needed if it can be > 0.
        feature_reduction, feature_imitate, feature_relu_mask, detach_features,
        feature_exit_weight: `reduction`, `imitate`, `relu_mask`, `detach` and `weight` of
            `msdkern.nn.feature_loss`. Rows with ``target == ignore_index`` are left out. The
            feature term is reduced as its own reduction says, whatever ``reduction`` is; a
            normalizer replaces its row count too.
        schedule: maps progress in [0, 1] to new values of buffers, for `set_progress`.
        adapt_temperature: (bound, factor): after a step in training mode T is multiplied by the
            factor if the deepest exit's mean max-probability at T exceeds the bound. Decided on
            the device.

    Attributes:
        terms: detached values of the last call: ``loss`` 0-d; ``cross_entropy`` [K], means over
            valid rows; ``divergence`` [K], means of s sum_j W_ij D_ij as they enter the loss;
            ``feature`` 0-d, before feature_weight; ``pair_divergence`` if asked for.
        needs_features, needs_teacher: whether a call must bring them.
    """

    terms: dict[str, Tensor]
    _temperature: Tensor
    exit_weight: Tensor | None
    pair_weight: Tensor | None
    pair_scale: Tensor
    feature_weight: Tensor
    class_weight: Tensor | None

    def __init__(
        self,
        *,
        exit_weight: Number | Sequence[float] | None = None,
        pair_weight: str | Tensor | None = None,
        pair_scale: Number = 1.0,
        temperature: Number = 1.0,
        temperature_squared: bool = True,
        divergence: str = "forward_kl",
        beta: float = 0.5,
        detach_teacher: bool = True,
        class_weight: Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        pair_divergence: bool = False,
        pair_mean: str = "rows",
        teacher: str = "external",
        feature_weight: float = 0.0,
        feature_reduction: str = "mean",
        feature_imitate: str = "last",
        feature_relu_mask: bool = False,
        detach_features: bool = True,
        feature_exit_weight: Sequence[float] | None = None,
        schedule: Schedule | None = None,
        adapt_temperature: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        _choice("pair_mean", pair_mean, ("rows", "elements"))
        _choice("teacher", teacher, tuple(TEACHERS))
        _choice("feature_reduction", feature_reduction, tuple(REDUCTIONS))
        _choice("feature_imitate", feature_imitate, tuple(TARGETS))
        _positive("temperature", temperature)
        self.ignore_index = ignore_index
        self.pair_mean = pair_mean
        self.teacher = teacher
        self.schedule = schedule
        self.adapt_temperature = adapt_temperature
        self.options: dict[str, Any] = {
            "temperature_squared": temperature_squared,
            "divergence": divergence,
            "beta": beta,
            "detach_teacher": detach_teacher,
            "ignore_index": ignore_index,
            "label_smoothing": label_smoothing,
            "reduction": reduction,
            "pair_divergence": pair_divergence,
        }
        self.feature_options: dict[str, Any] = {
            "reduction": feature_reduction,
            "imitate": feature_imitate,
            "relu_mask": feature_relu_mask,
            "detach": detach_features,
            "weight": feature_exit_weight,
        }
        self.pair_name = pair_weight if isinstance(pair_weight, str) else None
        matrix = pair_weight if isinstance(pair_weight, Tensor) else None
        self.needs_features = feature_weight > 0.0
        self.needs_teacher = _has_columns(matrix) if teacher == "external" else teacher == "exit"
        # Only the temperature is state that training changes by itself, and so is saved.
        self.register_buffer("_temperature", _buffer(temperature))
        self._keep("exit_weight", exit_weight)
        self._keep("pair_weight", matrix)
        self._keep("pair_scale", pair_scale)
        self._keep("feature_weight", feature_weight)
        self._keep("class_weight", class_weight)
        self.terms = {}

    def _keep(self, name: str, value: Any) -> None:
        self.register_buffer(name, _buffer(value), persistent=False)

    @property
    def temperature(self) -> Tensor:
        """T, a 0-d tensor. Assign a number to change it in place, a tensor to replace it."""
        return self._temperature

    @temperature.setter
    def temperature(self, value: Number) -> None:
        _positive("temperature", value)
        if isinstance(value, Tensor):
            self._temperature = value
        else:
            self._temperature.fill_(value)

    def set_progress(self, progress: float) -> None:
        """Tell the criterion how far training is, from 0 to 1, for settings with a schedule."""
        if not 0.0 <= progress <= 1.0:
            name = type(self).__name__
            raise ValueError(f"{name}: progress must be between 0 and 1; got {progress!r}")
        for name, value in (self.schedule(progress) if self.schedule else {}).items():
            buffer = getattr(self, name)
            buffer.copy_(torch.as_tensor(value, dtype=buffer.dtype))

    def forward(
        self,
        logits: Sequence[Tensor] | Tensor,
        target: Tensor | None = None,
        features: Sequence[Tensor] | None = None,
        teacher_logits: Sequence[Tensor] | Tensor | None = None,
        *,
        normalizer: Number | None = None,
        exit_weight: Tensor | None = None,
    ) -> Tensor:
        """The loss of one batch.

        Args:
            logits: K tensors [N, C], shallow to deep, or one [K, N, C].
            target: int64 [N], or float [N, C], or None: divergences only.
            features: K tensors [N, ...], where `needs_features`.
            teacher_logits: E tensors [N, C], or one, where `needs_teacher`. They must not
                require gradient (teacher="exit" excepted): compute them without it.
            normalizer: replaces the row count, for gradient accumulation and data parallelism.
            exit_weight: [K] or [K, N], for this call in place of the stored one: weights per row
                (L2W-DEN, JEI-DNN), curricula, confidences (EE-LLM).

        Raises:
            ValueError: if features or teachers are missing; and as `multi_exit_loss`.
            TypeError: for what a model returns as a mapping; and as `multi_exit_loss`.
        """
        if isinstance(logits, Mapping):
            rule = f"{type(self).__name__}: logits must be a sequence of tensors"
            raise TypeError(f"{rule}; got a mapping with {', '.join(map(str, logits))}")
        if not isinstance(logits, (Tensor, Sequence)) or len(logits) == 0:
            return ops.multi_exit_loss(logits, target).loss  # which says what is wrong
        logits, teachers = self._with_teachers(logits, teacher_logits)
        z = logits[-1]
        out = ops.multi_exit_loss(
            logits,
            target,
            exit_weight=self._exit_weight(z, len(logits), exit_weight),
            pair_weight=self.pair_name or _on(self.pair_weight, z),
            pair_scale=self._pair_scale(z),
            teacher_logits=teachers,
            temperature=self._step_temperature(z),
            class_weight=_on(self.class_weight, z),
            normalizer=normalizer,
            **self.options,
        )
        loss = out.loss
        terms = {"cross_entropy": out.cross_entropy, "divergence": out.divergence}
        if out.pair_divergence is not None:
            terms["pair_divergence"] = out.pair_divergence
        if self.needs_features:
            term = self._feature_term(features, target, normalizer)
            terms["feature"] = term.detach()
            loss = loss + self.feature_weight * term
        if self._adapts:
            self._adapt_temperature(z.detach(), self._valid(target))
        self.terms = {"loss": loss.detach(), **terms}
        return loss

    # Pieces of forward ------------------------------------------------------------------------

    def _with_teachers(self, logits: Any, teacher_logits: Any) -> tuple[Any, Any]:
        if isinstance(teacher_logits, Tensor):
            teacher_logits = [teacher_logits]
        if self.needs_teacher and not teacher_logits:
            raise ValueError(f"{type(self).__name__}: teacher_logits are needed; got none")
        return TEACHERS[self.teacher](logits, teacher_logits)

    def _exit_weight(self, z: Tensor, exits: int, given: Tensor | None) -> Tensor | None:
        weight = self.exit_weight if given is None else given
        if weight is not None and weight.dim() == 0:
            weight = weight.to(z.device).expand(exits)
        return _on(weight, z)

    def _pair_scale(self, z: Tensor) -> Tensor:
        return self.pair_scale / z.shape[1] if self.pair_mean == "elements" else self.pair_scale

    def _valid(self, target: Tensor | None) -> Tensor | None:
        """Rows that count, or None for all: only class indices can be ignored."""
        return None if target is None or target.dim() != 1 else target != self.ignore_index

    def _feature_term(
        self, features: Sequence[Tensor] | None, target: Tensor | None, normalizer: Number | None
    ) -> Tensor:
        if features is None:
            rule = f"{type(self).__name__}: features are needed for the feature term"
            raise ValueError(f"{rule} (model(x, features=True) gives them); got None")
        valid = self._valid(target)
        return feature_loss(features, valid, normalizer=normalizer, **self.feature_options)

    @property
    def _adapts(self) -> bool:
        return self.adapt_temperature is not None and self.training

    def _step_temperature(self, z: Tensor) -> Tensor:
        """T of this step: a copy if it changes afterwards, for backward must still see it."""
        if not self._adapts:
            return self._temperature
        if self._temperature.device != z.device:
            self._temperature = self._temperature.to(z.device)
        return self._temperature.clone()

    def _adapt_temperature(self, z: Tensor, valid: Tensor | None) -> None:
        bound, factor = self.adapt_temperature or (1.0, 1.0)
        confidence = (z.float() / self._temperature).softmax(-1).amax(-1)
        valid = torch.ones_like(confidence, dtype=torch.bool) if valid is None else valid
        # Without a valid row the mean is 0 / 0, which exceeds nothing.
        mean = torch.where(valid, confidence, 0.0).sum() / valid.sum()
        self._temperature.mul_(torch.where(mean > bound, factor, 1.0))

    def extra_repr(self) -> str:
        pairs = self.pair_name or (None if self.pair_weight is None else "matrix")
        return f"pair_weight={pairs!r}, divergence={self.options['divergence']!r}"


class MSDLoss(MultiExitLoss):
    """Multi-self-distillation, equation (8): labels, every exit as teacher, deepest feature.

    ::

        L = (1 - alpha) sum_k CE_k + alpha / (K - 1) sum_i sum_{j != i} T^2 KL(q_j || q_i)
            + beta_t sum_{i < K} ||F_i - F_K||^2
        beta_t = beta_end + (beta_begin - beta_end) (1 + cos(pi t)) / 2,  t by `set_progress`

    q = softmax(z / T), F_k the vector in front of exit k's classifier; the feature term is the
    mean over valid rows of the squared L2 norm. ``criterion(logits, target, features=None)``:
    features are needed when beta_begin or beta_end is positive.

    Source: Luan, Zhao, Yang, Dai, "MSD: Multi-Self-Distillation Learning via Multi-classifiers
    within Deep Neural Networks", arXiv 1911.09418. The text leaves open, and here are options:

    - the factor T^2: not in the text; on here (``temperature_squared=False`` leaves it out),
      because without it the divergences' gradients fade as 1 / T^2;
    - whether teachers are detached: not stated; detached here, so student i receives
      KL(sg[q_j] || q_i). ``detach_teacher=False`` gives the true mutual gradient;
    - the direction of KL(q_i, q_j): over all ordered pairs the value is the same either way, and
      so is the undetached gradient; detached, "forward_kl" and "reverse_kl" differ;
    - whether F_K is detached and how the feature term is averaged: ``detach_features``,
      ``feature_reduction`` ("sum" is what BYOT does, with a weight of 1e-6);
    - the values of alpha, T and beta: not in the public material. alpha = 0.1 and T = 3 come from
      the first author's code for BYOT; beta is 0 here and 1e-4 in `create("msd", exits)`. The
      brackets of beta_t, misplaced as typeset, are read as a cosine between the two.

    Args:
        alpha: weight of the divergences in [0, 1]; labels get 1 - alpha.
        temperature: T > 0, a number or a 0-d tensor; may be reassigned during training.
        beta_begin, beta_end: weight of the feature term at the begin and end of training.
        exit_weight: per-exit weights [K] of the cross entropies, times 1 - alpha; default ones.
        options: of `MultiExitLoss`: temperature_squared, detach_teacher, divergence, beta (of
            the "jsd" divergence), feature_reduction, detach_features, ignore_index,
            label_smoothing, class_weight, reduction, pair_weight, pair_divergence, ...

    Raises:
        ValueError: for alpha outside [0, 1], a negative beta, and as `multi_exit_loss`.
    """

    def __init__(
        self,
        alpha: float = 0.1,
        temperature: Number = 3.0,
        beta_begin: float = 0.0,
        beta_end: float = 0.0,
        *,
        exit_weight: Sequence[float] | Tensor | None = None,
        **options: Any,
    ) -> None:
        if not 0.0 <= alpha <= 1.0:
            raise ValueError(f"MSDLoss: alpha must be between 0 and 1; got {alpha!r}")
        for name, value in (("beta_begin", beta_begin), ("beta_end", beta_end)):
            if not value >= 0.0:
                raise ValueError(f"MSDLoss: {name} must not be negative; got {value!r}")
        weight = torch.as_tensor(1.0 if exit_weight is None else exit_weight) * (1.0 - alpha)
        settings: dict[str, Any] = {
            "pair_weight": "mutual",
            "feature_weight": max(beta_begin, beta_end),
            "schedule": partial(_annealed, begin=beta_begin, end=beta_end),
            **options,
        }
        super().__init__(exit_weight=weight, pair_scale=alpha, temperature=temperature, **settings)
        self.set_progress(0.0)


def _annealed(progress: float, begin: float, end: float) -> dict[str, float]:
    return {"feature_weight": anneal(progress, begin, end)}


def _buffer(value: Any) -> Tensor | None:
    if value is None or isinstance(value, Tensor):
        return value
    return torch.tensor(value, dtype=torch.float32)


def _on(value: Tensor | None, like: Tensor) -> Tensor | None:
    """On the device of the logits, for a criterion nobody moved; scalars may stay on the host."""
    return value if value is None or value.dim() == 0 else value.to(like.device)


def _has_columns(matrix: Tensor | None) -> bool:
    """Whether W [K, K + E] speaks of external teachers."""
    return matrix is not None and matrix.shape[1] > matrix.shape[0]


def _choice(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        rule = f"MultiExitLoss: {name} must be one of {', '.join(allowed)}"
        raise ValueError(f"{rule}; got {value!r}")


def _positive(name: str, value: Number) -> None:
    if not isinstance(value, Tensor) and not 0.0 < value < float("inf"):
        raise ValueError(f"MultiExitLoss: {name} must be positive and finite; got {value!r}")

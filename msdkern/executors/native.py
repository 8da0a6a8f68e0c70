# SPDX-License-Identifier: Apache-2.0
"""Executor `cpu`: the C++ kernels. The only file that reads the addresses of tensors.

Every call arrives here through a registered op, on plain strided CPU tensors that the checks in
msdkern/ops have seen. This file lays out pointer tables and outputs, and turns status codes into
sentences.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from msdkern import reference

ABI_VERSION = 2
DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}
PAIR_CODES = {"none": 0, "mutual": 1, "last": 2, "deeper": 3, "next": 4, "dense": 5}
DIVERGENCE_CODES = {"forward_kl": 0, "reverse_kl": 1, "jsd": 2, "soft_ce": 3}
MEASURE_CODES = {
    "confidence": 0, "margin": 1, "entropy": 2, "normalized_entropy": 3, "max_logit": 4,
    "patience": 5, "score": 6,
}  # fmt: skip
SCALAR, ROWS, ROWS_BACKWARD = 0, 1, 2
TENSORS = 32  # that one copy of rows takes


@functools.cache
def _load() -> tuple[Any, str | None]:
    try:
        from msdkern import _cpu  # type: ignore[attr-defined]
    except ImportError as error:
        return None, f"the native module msdkern._cpu is not there ({error})"
    if _cpu.abi_version != ABI_VERSION:
        return None, (
            f"msdkern._cpu has ABI version {_cpu.abi_version}, this package needs {ABI_VERSION}: "
            "install again"
        )
    return _cpu, None


def reason() -> str | None:
    return _load()[1]


def _kernels() -> Any:
    return _load()[0]


# Pointer tables -------------------------------------------------------------------------------


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _unit_columns(tensor: Tensor) -> Tensor:
    """The tensor itself, or a copy where neighbouring classes are not neighbours in memory."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _table(tensors: Sequence[Tensor]) -> tuple[list[int], list[int]]:
    """Address and row stride of every exit, for K tensors [N, C] or one [K, N, C]."""
    first = tensors[0]
    if first.dim() == 3:
        step, row, _ = first.stride()
        step *= first.element_size()
        start = first.data_ptr()
        return [start + k * step for k in range(first.shape[0])], [row] * first.shape[0]
    return [t.data_ptr() for t in tensors], [t.stride(0) for t in tensors]


def _gradient_table(
    logits: Sequence[Tensor], wanted: Sequence[bool]
) -> tuple[list[Tensor], list[int]]:
    """Fresh contiguous gradients, and the address of each exit's (0 where none is wanted)."""
    if not any(wanted):
        return [], []
    fresh = [
        torch.empty_like(z, memory_format=torch.contiguous_format) if want else None
        for z, want in zip(logits, wanted, strict=True)
    ]
    kept = [g for g in fresh if g is not None]
    if kept[0].dim() == 3:
        return kept, _table(kept)[0]
    return kept, [_address(g) for g in fresh]


def _real(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype).contiguous()


# The loss family ------------------------------------------------------------------------------


def _fail(
    op: str, status: int, bad_label: int, classes: int, skip: int, temperature: float
) -> NoReturn:
    sentences = {
        1: f"labels must be in [0, {classes}) or ignore_index = {skip}; got {bad_label}",
        2: f"temperature must be positive and finite; got {temperature}",
    }
    if status == 3:
        raise MemoryError(f"{op}: no memory for scratch rows of {classes} classes")
    raise ValueError(f"{op}: {sentences.get(status, f'sizes out of range (status {status})')}")


def _call_loss(
    op: str,
    form: int,
    outputs: Sequence[Tensor | None],
    gradient: Sequence[bool],
    mean: bool,
    normalizer: Tensor | None,
    logits: Sequence[Tensor],
    teacher_logits: Sequence[Tensor],
    target: Tensor | None,
    exit_weight: Tensor | None,
    pairs: str,
    pair_weight: Tensor | None,
    pair_scale: Tensor,
    temperature: Tensor,
    temperature_squared: bool,
    divergence: str,
    beta: float,
    detach_teacher: bool,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
) -> list[Tensor]:
    """One call of the kernels; returns the gradients."""
    dtype = logits[0].dtype
    logits = [_unit_columns(z) for z in logits]
    exits, rows, classes = reference.sizes(logits)
    addresses, strides = _table(logits)
    if teacher_logits:
        teacher_logits = [_unit_columns(t) for t in teacher_logits]
        more = _table(teacher_logits)
        addresses, strides = addresses + more[0], strides + more[1]
    gradients, gradient_addresses = _gradient_table(logits, gradient)
    label = probabilities = None
    if target is not None:
        if target.dtype == torch.int64:
            label = target.contiguous()
        else:
            probabilities = _real(target, reference.accumulation_dtype(dtype))
    if divergence == "jsd" and beta in (0.0, 1.0):
        divergence = "reverse_kl" if beta else "forward_kl"
    t = temperature.item()
    divisor = 0.0  # none given
    if normalizer is not None:
        divisor = float(normalizer.item())
        if not 0 <= divisor < math.inf:
            raise ValueError(f"{op}: normalizer must be finite and not negative; got {divisor}")
        divisor = divisor or math.inf  # no rows counted: r = 0
    status, bad_label = _kernels().loss(
        form,
        DTYPE_CODES[dtype],
        torch.get_num_threads(),
        exits,
        rows,
        classes,
        addresses,
        strides,
        gradient_addresses,
        _address(label),
        _address(probabilities),
        _address(exit_weight),
        exit_weight is not None and exit_weight.dim() == 2,
        PAIR_CODES[pairs],
        _address(pair_weight),
        pair_weight is not None and pair_weight.dim() == 3,
        pair_scale.item(),
        t,
        temperature_squared,
        DIVERGENCE_CODES[divergence],
        beta,
        detach_teacher,
        _address(class_weight),
        ignore_index,
        label_smoothing,
        mean,
        divisor,
        [_address(o) for o in outputs],
    )
    if status:
        _fail(op, status, bad_label, classes, ignore_index, t)
    return gradients


def multi_exit_loss(
    logits: Sequence[Tensor], teacher_logits: Sequence[Tensor], *arguments: Any
) -> tuple[Any, ...]:
    *row_arguments, reduction, normalizer, pair_divergence, gradient = arguments
    exits, rows, _ = reference.sizes(logits)
    dtype = reference.accumulation_dtype(logits[0].dtype)
    matrix = (exits, exits + len(teacher_logits)) if pair_divergence else (0,)
    outputs = (
        torch.empty((), dtype=dtype),
        torch.empty(exits, dtype=dtype),
        torch.empty(exits, dtype=dtype),
        torch.empty(*matrix, dtype=dtype),
        torch.empty(exits, rows, dtype=torch.int64),
        torch.empty(exits, rows, dtype=dtype),
    )
    wanted = outputs if pair_divergence else (*outputs[:3], None, *outputs[4:])
    gradients = _call_loss(
        "multi_exit_loss", SCALAR, wanted, gradient, reduction == "mean", normalizer,
        logits, teacher_logits, *row_arguments,
    )  # fmt: skip
    return (*outputs, gradients)


def multi_exit_row_losses(logits: Sequence[Tensor], *arguments: Any) -> tuple[Tensor, ...]:
    dtype = reference.accumulation_dtype(logits[0].dtype)
    outputs = tuple(torch.empty(reference.sizes(logits)[:2], dtype=dtype) for _ in range(2))
    _call_loss("multi_exit_row_losses", ROWS, outputs, (), False, None, logits, *arguments)
    return outputs


def multi_exit_row_losses_backward(
    grad_cross_entropy: Tensor, grad_divergence: Tensor, logits: Sequence[Tensor], *arguments: Any
) -> list[Tensor]:
    *row_arguments, gradient = arguments
    dtype = reference.accumulation_dtype(logits[0].dtype)
    upstream = [_real(g, dtype) for g in (grad_cross_entropy, grad_divergence)]
    return _call_loss(
        "multi_exit_row_losses", ROWS_BACKWARD, upstream, gradient, False, None, logits,
        *row_arguments,
    )  # fmt: skip


# Softmax, statistics, scaling -----------------------------------------------------------------


def _softmax(
    backward: bool,
    inputs: Sequence[Tensor],
    upstream: Sequence[Tensor],
    temperature: Tensor,
    log: bool,
) -> list[Tensor]:
    inputs = [_unit_columns(z) for z in inputs]
    upstream = [_unit_columns(g) for g in upstream]
    _, rows, classes = reference.sizes(inputs)
    outputs = [torch.empty(z.shape, dtype=z.dtype) for z in inputs]
    t = temperature.item()
    status = _kernels().softmax(
        backward,
        DTYPE_CODES[inputs[0].dtype],
        torch.get_num_threads(),
        rows,
        classes,
        t,
        log,
        *_table(inputs),
        *(_table(upstream) if upstream else ([], [])),
        _table(outputs)[0],
    )
    if status:
        _fail("multi_exit_softmax", status, 0, classes, 0, t)
    return outputs


def multi_exit_softmax(logits: Sequence[Tensor], temperature: Tensor, log: bool) -> list[Tensor]:
    return _softmax(False, logits, (), temperature, log)


def multi_exit_softmax_backward(
    gradients: Sequence[Tensor], outputs: Sequence[Tensor], temperature: Tensor, log: bool
) -> list[Tensor]:
    return _softmax(True, outputs, gradients, temperature, log)


def exit_statistics(logits: Sequence[Tensor]) -> tuple[Tensor, ...]:
    logits = [_unit_columns(z) for z in logits]
    exits, rows, classes = reference.sizes(logits)
    dtype = reference.accumulation_dtype(logits[0].dtype)
    dtypes = (dtype, dtype, torch.int64, dtype, dtype, dtype)
    outputs = tuple(torch.empty((exits, rows), dtype=d) for d in dtypes)
    code, threads = DTYPE_CODES[logits[0].dtype], torch.get_num_threads()
    addresses = [_address(o) for o in outputs]
    status = _kernels().statistics(code, threads, rows, classes, *_table(logits), addresses)
    if status:
        _fail("exit_statistics", status, 0, classes, 0, 1.0)
    return outputs


# Gates and rows -------------------------------------------------------------------------------


def _gate(
    op: str,
    step: bool,
    logits: Sequence[Tensor],
    threshold: Tensor,
    measure: str,
    temperature: Tensor,
    score: Tensor | None,
    previous: tuple[Tensor | None, Tensor | None],
    live: Tensor | None,
    outputs: Sequence[Tensor],
) -> None:
    logits = [_unit_columns(z) for z in logits]
    first = logits[0]
    rows, classes = first.shape[-2], first.shape[-1]
    addresses, strides = _table(logits)
    temperatures, thresholds = temperature.view(-1).tolist(), threshold.view(-1).tolist()
    previous_prediction, previous_score = previous
    status = _kernels().gate(
        step,
        DTYPE_CODES[first.dtype],
        torch.get_num_threads(),
        MEASURE_CODES[measure],
        rows,
        rows if live is None else live.item(),
        classes,
        addresses,
        strides,
        temperatures,
        thresholds,
        _address(score),
        _address(previous_prediction),
        _address(previous_score),
        [o.data_ptr() for o in outputs],
    )
    if status == 2:
        raise ValueError(
            f"{op}: temperature must be positive and finite; got {temperature.tolist()}"
        )
    if status == 6:
        raise ValueError(f"{op}: threshold must not be NaN; got {threshold.tolist()}")
    if status == 4:
        raise ValueError(f"{op}: live must be between 0 and {rows}; got {live}")
    if status:
        _fail(op, status, 0, classes, 0, 1.0)


def exit_gate(
    logits: Sequence[Tensor],
    threshold: Tensor,
    measure: str,
    temperature: Tensor,
    score: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    _, rows, _ = reference.sizes(logits)
    dtype = reference.accumulation_dtype(logits[0].dtype)
    index, prediction = (torch.empty(rows, dtype=torch.int64) for _ in range(2))
    found = torch.empty(rows, dtype=dtype)
    _gate(
        "exit_gate", False, logits, threshold, measure, temperature, _real(score, dtype),
        (None, None), None, (prediction, found, index),
    )  # fmt: skip
    return index, prediction, found


def gate_step(
    logits: Tensor,
    threshold: Tensor,
    measure: str,
    temperature: Tensor,
    score: Tensor | None,
    previous_prediction: Tensor | None,
    previous_score: Tensor | None,
    live: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, dtype = logits.shape[0], reference.accumulation_dtype(logits.dtype)
    prediction, stay = (torch.empty(rows, dtype=torch.int64) for _ in range(2))
    found = torch.empty(rows, dtype=dtype)
    count = torch.empty((), dtype=torch.int64)
    if previous_prediction is not None:
        previous_prediction = previous_prediction.contiguous()
    _gate(
        "gate_step", True, (logits,), threshold, measure, temperature, _real(score, dtype),
        (previous_prediction, _real(previous_score, dtype)), live,
        (prediction, found, stay, count),
    )  # fmt: skip
    return prediction, found, stay, count


def _row_table(tensors: Sequence[Tensor]) -> tuple[list[int], list[int]]:
    """Address of every tensor, and the distance between its rows in bytes."""
    strides = [t.stride(0) * t.element_size() for t in tensors]
    return [t.data_ptr() for t in tensors], strides


def _copy_rows(
    op: str,
    scatter: bool,
    source: Sequence[Tensor],
    target: Sequence[Tensor],
    index: Tensor,
    count: int,
) -> None:
    capacity, limit = (s[0].shape[0] for s in ((source, target) if scatter else (target, source)))
    index = index.contiguous()
    for i in range(0, len(source), TENSORS):
        sources, targets = source[i : i + TENSORS], target[i : i + TENSORS]
        (from_address, from_stride), (to_address, to_stride) = map(_row_table, (sources, targets))
        status, bad_index = _kernels().copy_rows(
            scatter,
            torch.get_num_threads(),
            count,
            capacity,
            limit,
            index.data_ptr(),
            from_address,
            to_address,
            from_stride,
            to_stride,
            [t.nbytes // (len(t) or 1) for t in sources],
        )
        if status == 5:
            raise ValueError(f"{op}: rows must be in [0, {limit}); got {bad_index}")
        if status:
            raise ValueError(f"{op}: count must be between 0 and {capacity}; got {count}")


def compact_rows(
    x: Sequence[Tensor], stay: Tensor, count: Tensor | None, capacity: int
) -> list[Tensor]:
    formats = [reference.row_format(t) for t in x]
    x = [t.contiguous(memory_format=f) for t, f in zip(x, formats, strict=True)]
    result = [
        torch.empty((capacity, *t.shape[1:]), dtype=t.dtype, memory_format=f)
        for t, f in zip(x, formats, strict=True)
    ]
    kept = capacity if count is None else int(count.item())
    _copy_rows("compact_rows", False, x, result, stay, kept)
    return result


def scatter_rows(
    out: Sequence[Tensor], values: Sequence[Tensor], index: Tensor, count: Tensor | None
) -> None:
    # Rows written in place must be dense and laid out like the values.
    targets = [t if t.is_contiguous() else t.contiguous() for t in out]
    kept = values[0].shape[0] if count is None else int(count.item())
    _copy_rows("scatter_rows", True, [v.contiguous() for v in values], targets, index, kept)
    for t, written in zip(out, targets, strict=True):
        if written is not t:
            t.copy_(written)


def scale_(tensors: Sequence[Tensor], factor: Tensor) -> None:
    f = factor.item()
    if f == 1.0:
        return
    code, threads = DTYPE_CODES[tensors[0].dtype], torch.get_num_threads()
    addresses, sizes = [_address(t) for t in tensors], [t.numel() for t in tensors]
    _kernels().scale(code, threads, f, addresses, sizes)

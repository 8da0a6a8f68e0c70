# SPDX-License-Identifier: Apache-2.0
"""The gate family of executors `cpu` and `cuda`: gates, and the rows that stay."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from msdkern import reference
from msdkern.executors.tables import DTYPE_CODES, address, real, table

TENSORS = 32  # that one copy of rows takes


class Gates:
    """The gate family on one kind of machine, which says where its calls run."""

    def kernels(self) -> Any:
        raise NotImplementedError

    def device(self, like: Tensor) -> torch.device | None:
        raise NotImplementedError

    def place(
        self, like: Tensor, exits: int, teachers: int, scalars: Sequence[Tensor | None]
    ) -> Any:
        raise NotImplementedError

    def fail(self, op: str, status: int) -> None:
        raise NotImplementedError

    def numbers(self, value: Tensor, dtype: torch.dtype) -> tuple[list[float], Tensor | None]:
        """Thresholds or temperatures that kernels get by value, or as a tensor's address."""
        return value.view(-1).tolist(), None

    def count(self, value: Tensor | None, otherwise: int) -> tuple[int, Tensor | None]:
        """A number of rows, by value or as a tensor whose address kernels get."""
        return otherwise if value is None else int(value.item()), None

    def _gate(
        self,
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
        first = logits[0]
        rows, classes = first.shape[-2], first.shape[-1]
        addresses, strides, _copies = table(logits)
        temperatures, temperature_there = self.numbers(temperature, first.dtype)
        thresholds, threshold_there = self.numbers(threshold, first.dtype)
        alive, live_there = self.count(live, rows)
        previous_prediction, previous_score = previous
        status = self.kernels().gate(
            step,
            DTYPE_CODES[first.dtype],
            self.place(first, 1, 0, (temperature_there, threshold_there, live_there)),
            reference.MEASURES.index(measure),
            rows,
            alive,
            classes,
            addresses,
            strides,
            temperatures,
            thresholds,
            address(score),
            address(previous_prediction),
            address(previous_score),
            [address(o) for o in outputs],
        )
        if not status:
            return
        self.fail(op, status)
        if status == 3:
            raise MemoryError(f"{op}: no memory for {rows} rows")
        sentences = {
            2: f"temperature must be positive and finite; got {temperature.tolist()}",
            4: f"live must be between 0 and {rows}; got {live}",
            6: f"threshold must not be NaN; got {threshold.tolist()}",
        }
        raise ValueError(f"{op}: {sentences.get(status, f'sizes out of range (status {status})')}")

    def exit_gate(
        self,
        logits: Sequence[Tensor],
        threshold: Tensor,
        measure: str,
        temperature: Tensor,
        score: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        _, rows, _ = reference.sizes(logits)
        dtype, device = reference.accumulation_dtype(logits[0].dtype), self.device(logits[0])
        index, prediction = (torch.empty(rows, dtype=torch.int64, device=device) for _ in range(2))
        found = torch.empty(rows, dtype=dtype, device=device)
        self._gate(
            "exit_gate", False, logits, threshold, measure, temperature, real(score, dtype),
            (None, None), None, (prediction, found, index),
        )  # fmt: skip
        return index, prediction, found

    def gate_step(
        self,
        logits: Tensor,
        threshold: Tensor,
        measure: str,
        temperature: Tensor,
        score: Tensor | None,
        previous_prediction: Tensor | None,
        previous_score: Tensor | None,
        live: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rows, device = logits.shape[0], self.device(logits)
        dtype = reference.accumulation_dtype(logits.dtype)
        prediction, stay = (torch.empty(rows, dtype=torch.int64, device=device) for _ in range(2))
        found = torch.empty(rows, dtype=dtype, device=device)
        count = torch.empty((), dtype=torch.int64, device=device)
        if previous_prediction is not None:
            previous_prediction = previous_prediction.contiguous()
        self._gate(
            "gate_step", True, (logits,), threshold, measure, temperature, real(score, dtype),
            (previous_prediction, real(previous_score, dtype)), live,
            (prediction, found, stay, count),
        )  # fmt: skip
        return prediction, found, stay, count

    def _copy_rows(
        self,
        op: str,
        scatter: bool,
        source: Sequence[Tensor],
        target: Sequence[Tensor],
        index: Tensor,
        count: Tensor | None,
    ) -> None:
        capacity, limit = (
            s[0].shape[0] for s in ((source, target) if scatter else (target, source))
        )
        index = index.contiguous()
        kept, count_there = self.count(count, capacity)
        for i in range(0, len(source), TENSORS):
            sources, targets = source[i : i + TENSORS], target[i : i + TENSORS]
            from_table, to_table = map(_row_table, (sources, targets))
            status, bad_index = self.kernels().copy_rows(
                scatter,
                self.place(index, 1, 0, (count_there,)),
                kept,
                capacity,
                limit,
                address(index),
                from_table[0],
                to_table[0],
                from_table[1],
                to_table[1],
                [math.prod(t.shape[1:]) * t.element_size() for t in sources],
            )
            if not status:
                continue
            self.fail(op, status)
            if status == 5:
                raise ValueError(f"{op}: rows must be in [0, {limit}); got {bad_index}")
            raise ValueError(f"{op}: count must be between 0 and {capacity}; got {kept}")

    def compact_rows(
        self, x: Sequence[Tensor], stay: Tensor, count: Tensor | None, capacity: int
    ) -> list[Tensor]:
        formats = [reference.row_format(t) for t in x]
        x = [t.contiguous(memory_format=f) for t, f in zip(x, formats, strict=True)]
        device = self.device(stay)
        result = [
            torch.empty((capacity, *t.shape[1:]), dtype=t.dtype, memory_format=f, device=device)
            for t, f in zip(x, formats, strict=True)
        ]
        self._copy_rows("compact_rows", False, x, result, stay, count)
        return result

    def scatter_rows(
        self,
        out: Sequence[Tensor],
        values: Sequence[Tensor],
        index: Tensor,
        count: Tensor | None,
    ) -> None:
        # Rows written in place must be dense and laid out like the values.
        targets = [t if t.is_contiguous() else t.contiguous() for t in out]
        sources = [v.contiguous() for v in values]
        self._copy_rows("scatter_rows", True, sources, targets, index, count)
        for t, written in zip(out, targets, strict=True):
            if written is not t:
                t.copy_(written)


def _row_table(tensors: Sequence[Tensor]) -> tuple[list[int], list[int]]:
    """Address of every tensor, and the distance between its rows in bytes."""
    strides = [t.stride(0) * t.element_size() for t in tensors]
    return [address(t) for t in tensors], strides

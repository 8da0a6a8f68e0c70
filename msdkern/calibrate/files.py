# SPDX-License-Identifier: Apache-2.0
"""Thresholds as JSON that names the model and the data they were found on."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from msdkern import reference
from msdkern.cli import CommandError

FORMAT = "msdkern thresholds 1"


@dataclass(frozen=True)
class Thresholds:
    """When rows leave: one threshold and one temperature per exit, and where they come from.

    ``model`` and ``data`` are fingerprints. ``method`` and ``predicted`` are for the reader: how
    the thresholds were chosen, and accuracy, cost and shares on the calibration rows.

    Raises ``CommandError`` when a value is outside its range.
    """

    measure: str
    thresholds: tuple[float, ...]
    temperature: tuple[float, ...]
    model: str
    data: str
    method: Mapping[str, Any] = field(default_factory=dict)
    predicted: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = [m for m in reference.MEASURES if m != "score"]
        if self.measure not in known:
            raise CommandError(f"measure must be one of {', '.join(known)}; got {self.measure!r}")
        for name in ("thresholds", "temperature"):
            values = getattr(self, name)
            if not isinstance(values, (list, tuple)) or not all(map(_is_number, values)):
                raise CommandError(f"{name} must be numbers, one per exit; got {values!r}")
            object.__setattr__(self, name, tuple(float(v) for v in values))
        if not 0 < len(self.thresholds) == len(self.temperature):
            rule = "thresholds and temperature must be as many"
            raise CommandError(f"{rule}; got {len(self.thresholds)} and {len(self.temperature)}")
        if any(math.isnan(v) for v in self.thresholds):
            raise CommandError("thresholds must not be NaN")
        if not all(0 < t < math.inf for t in self.temperature):
            raise CommandError(f"temperature must be positive; got {list(self.temperature)}")
        for name in ("model", "data"):
            if not isinstance(getattr(self, name), str):
                raise CommandError(f"{name} must be a fingerprint; got {getattr(self, name)!r}")

    def require(self, model: str | None = None, data: str | None = None, what: str = "thresholds"):
        """Returns itself; raises ``CommandError`` if they belong to another model or data set."""
        for name, text, given in (
            ("model", "weights", model),
            ("data", "images", data),
        ):
            own = getattr(self, name)
            if given is not None and own != given:
                raise CommandError(
                    f"{what}: were found with other {text}: {name} {own[:12]}, not {given[:12]}"
                )
        return self


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def model_fingerprint(model: nn.Module | Mapping[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and values of a model's state, in order of the names."""
    state = model.state_dict() if isinstance(model, nn.Module) else model
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save(path: str | Path, thresholds: Thresholds) -> None:
    """Writes the file, whole or not at all. Infinite thresholds are written as words."""
    from msdkern.train.files import write_atomically

    record = {"format": FORMAT, **asdict(thresholds)}
    record["thresholds"] = [v if math.isfinite(v) else str(v) for v in thresholds.thresholds]
    text = json.dumps(record, indent=1, allow_nan=False) + "\n"
    write_atomically(Path(path), lambda file: file.write(text.encode()))


def load(
    path: str | Path, model: nn.Module | str | None = None, data: str | None = None
) -> Thresholds:
    """Reads the file and, where they are given, compares its fingerprints with model and data.

    Args:
        path: a file that `save` wrote.
        model: the model that is to use the thresholds, or its fingerprint.
        data: the fingerprint of the data set that is to be answered for.

    Raises: ``CommandError`` with one sentence.
    """
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CommandError(f"{path}: there is no such file") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise CommandError(f"{path}: not a thresholds file: {error}") from None
    if not isinstance(record, dict) or record.pop("format", None) != FORMAT:
        raise CommandError(f"{path}: not a thresholds file of msdkern calibrate")
    names = {f.name for f in fields(Thresholds)}
    wrong = sorted(names ^ record.keys())
    if wrong:
        raise CommandError(f"{path}: must hold exactly {', '.join(sorted(names))}; got {wrong}")
    infinite = {"inf": math.inf, "-inf": -math.inf}
    if isinstance(record["thresholds"], list):
        values = record["thresholds"]
        record["thresholds"] = [infinite.get(v, v) if isinstance(v, str) else v for v in values]
    try:
        found = Thresholds(**record)
    except CommandError as error:
        raise CommandError(f"{path}: {error}") from None
    own = model_fingerprint(model) if isinstance(model, nn.Module) else model
    return found.require(own, data, str(path))

# SPDX-License-Identifier: Apache-2.0
"""Thresholds files: whole, harmless, and only for the model and the data they were made for."""

import json
import math

import pytest
import torch

from msdkern import calibrate
from msdkern.cli import CommandError
from tests.infer.networks import Table, tables


def make(model, **changes):
    fields = {
        "measure": "entropy",
        "thresholds": (0.25, math.inf, -1e8),
        "temperature": (1.0, 0.5, 2.0),
        "model": calibrate.model_fingerprint(model),
        "data": "d" * 64,
        "method": {"name": "budgeted"},
        "predicted": {"accuracy": 0.5},
    }
    return calibrate.Thresholds(**{**fields, **changes})


@pytest.fixture
def model():
    return Table(tables(3, 4, 2, 0))


def test_there_and_back(model, tmp_path):
    path, made = tmp_path / "t.json", make(model)
    calibrate.save(path, made)
    assert calibrate.load(path) == made
    assert calibrate.load(path, model, "d" * 64) == made
    assert calibrate.load(path, made.model) == made
    json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(word))  # plain JSON
    assert [p.name for p in tmp_path.iterdir()] == ["t.json"]


def test_a_file_of_another_model_or_data_set_is_refused(model, tmp_path):
    path = tmp_path / "t.json"
    calibrate.save(path, make(model))
    own = calibrate.model_fingerprint(model)[:12]
    with torch.no_grad():
        model.stages[1].table[0, 0] += 1e-6
    other = calibrate.model_fingerprint(model)[:12]
    with pytest.raises(CommandError) as caught:
        calibrate.load(path, model)
    assert str(caught.value) == (f"{path}: were found with other weights: model {own}, not {other}")
    with pytest.raises(CommandError) as caught:
        calibrate.load(path, data="e" * 64)
    sentence = f"{path}: were found with other images: data {'d' * 12}, not {'e' * 12}"
    assert str(caught.value) == sentence


def test_fingerprint_depends_on_values_names_shapes_and_dtypes():
    state = {
        "a": torch.arange(4.0),
        "b": torch.zeros(2, dtype=torch.bfloat16),
        "c": torch.tensor(3),
    }
    first = calibrate.model_fingerprint(state)
    assert calibrate.model_fingerprint(dict(reversed(state.items()))) == first
    for other in (
        {**state, "a": torch.arange(4.0).view(2, 2)},
        {**state, "a": torch.arange(4.0).double()},
        {**state, "c": torch.tensor(4)},
        {"a": state["a"], "b": state["b"], "d": state["c"]},
    ):
        assert calibrate.model_fingerprint(other) != first


def test_damaged_files_are_one_sentence(model, tmp_path):
    path = tmp_path / "t.json"
    with pytest.raises(CommandError, match="there is no such file"):
        calibrate.load(path)
    calibrate.save(path, make(model))
    record = json.loads(path.read_text())
    changes = {
        "not a thresholds file: ": "no json",
        "not a thresholds file of msdkern calibrate": {**record, "format": "other 1"},
        "must hold exactly data, measure, ": {**record, "more": 1},
        "measure must be one of confidence, ": {**record, "measure": "sum"},
        "thresholds must be numbers, one per exit; got [None, 1, 2]": {
            **record, "thresholds": [None, 1, 2]},
        "thresholds must not be NaN": {**record, "thresholds": [0.5, float("nan"), 1]},
        "thresholds and temperature must be as many; got 1 and 3": {**record, "thresholds": [1]},
        "temperature must be positive; got [1.0, 0.0, 1.0]": {**record, "temperature": [1, 0, 1]},
        "model must be a fingerprint; got 7": {**record, "model": 7},
    }  # fmt: skip
    for sentence, content in changes.items():
        text = content if isinstance(content, str) else json.dumps(content)
        path.write_text(text)
        with pytest.raises(CommandError) as caught:
            calibrate.load(path)
        assert str(caught.value).startswith(f"{path}: {sentence}"), sentence
        assert "\n" not in str(caught.value)

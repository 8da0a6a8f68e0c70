# SPDX-License-Identifier: Apache-2.0
"""The config is the command line, the JSON file and the checkpoint's record at once."""

import argparse
import json
from dataclasses import fields

import pytest

from msdkern.cli import CommandError
from msdkern.train.config import (
    TrainConfig,
    add_config_arguments,
    check_fields,
    flag,
    given_options,
    read_fields,
)


def parse(*words):
    parser = argparse.ArgumentParser()
    add_config_arguments(parser)
    return given_options(parser.parse_args(words))


def test_every_field_is_an_option_with_help(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = capsys.readouterr().out
    for item in fields(TrainConfig):
        assert flag(item.name) in text
        assert item.metadata["help"]
    assert "default: 20" in text


def test_only_given_options_are_given():
    assert parse() == {}
    assert parse("--lr", "0.5", "--no-channels-last", "--loss-option", "beta=0.2") == {
        "lr": 0.5,
        "channels_last": False,
        "loss_option": ("beta=0.2",),
    }


def test_json_round_trip(tmp_path):
    config = TrainConfig(
        lr=0.25, loss_option=("reduction=sum", "bound=0.4"), alpha=0.3, amp=True, epochs=3
    )
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config.to_dict()))
    assert TrainConfig(**read_fields(path)) == config


def test_command_line_wins_over_file(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"lr": 1, "epochs": 7}')
    given = parse("--config", str(path), "--epochs", "9")
    assert given == {"lr": 1.0, "epochs": 9}
    assert type(given["lr"]) is float


def test_loss_options_are_values():
    config = TrainConfig(alpha=0.3, loss_option=("adaptive=false", "divergence=jsd", "beta=0.2"))
    assert config.loss_options() == {
        "alpha": 0.3,
        "adaptive": False,
        "divergence": "jsd",
        "beta": 0.2,
    }


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": 0}, "--epochs: must be at least 1; got 0"),
        ({"lr": float("nan")}, "--lr: must be above 0; got nan"),
        ({"lr": 0.0}, "--lr: must be above 0; got 0.0"),
        ({"momentum": 1.0}, "--momentum: must be in [0, 1); got 1.0"),
        ({"held_out": 1.0}, "--held-out: must be between 0 and 1; got 1.0"),
        ({"data": "mnist"}, "--data: must be one of digits, cifar10, synthetic; got 'mnist'"),
        ({"loss_option": ("beta",)}, "--loss-option: must be NAME=VALUE"),
        ({"temperature": -1.0}, "--temperature: must be above 0; got -1.0"),
    ],
)
def test_values_out_of_range(values, message):
    with pytest.raises(CommandError) as error:
        TrainConfig(**values)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "must hold one JSON object; got list"),
        ("{", "not a JSON file"),
        ('{"epoch": 3}', "'epoch' is not an option of train"),
        ('{"epochs": "3"}', "epochs must be int; got '3'"),
        ('{"epochs": true}', "epochs must be int; got True"),
        ('{"amp": 1}', "amp must be bool; got 1"),
        ('{"lr": null}', "lr must be float; got None"),
    ],
)
def test_bad_files(tmp_path, text, message):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(CommandError, match=r"config\.json") as error:
        read_fields(path)
    assert message in str(error.value)


def test_absent_numbers_may_be_null():
    assert check_fields({"alpha": None, "width": None}, "x") == {"alpha": None, "width": None}

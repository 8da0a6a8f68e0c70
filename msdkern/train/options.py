# SPDX-License-Identifier: Apache-2.0
"""The options of every command that opens a checkpoint."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

_FIELDS: dict[str, dict[str, Any]] = {
    "root": {"help": "folder of the images, if they have moved"},
    "device": {"help": "cpu, cuda, ...; auto takes a GPU if there is one"},
    "executor": {"help": "who computes: auto, eager, cpu, ..."},
    "threads": {"type": int, "help": "CPU threads"},
    "amp": {
        "action": argparse.BooleanOptionalAction,
        "help": "compute the network in bfloat16 (default: as it was trained)",
    },
}


def add_checkpoint_arguments(
    parser: argparse.ArgumentParser, leave_out: Sequence[str] = ()
) -> None:
    """The checkpoint, the fields of its config that may change, and --json."""
    parser.add_argument("checkpoint", help="a checkpoint of msdkern train, such as last.pt")
    for name, settings in _FIELDS.items():
        if name not in leave_out:
            parser.add_argument(f"--{name}", default=argparse.SUPPRESS, **settings)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")


def given_fields(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of the config that the command line replaces."""
    return {name: getattr(args, name) for name in _FIELDS if hasattr(args, name)}


def add_batch_size(parser: argparse.ArgumentParser) -> None:
    """How many rows a network is given at once while its time is measured."""
    text = "rows at once while time is measured (default: 512)"
    parser.add_argument("--batch-size", type=_positive, default=512, metavar="ROWS", help=text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {text!r}")
    return int(text)

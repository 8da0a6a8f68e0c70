# SPDX-License-Identifier: Apache-2.0
"""The command line: one table of commands, each imported only when it is chosen."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

# name: (module with add_arguments(parser) and run(args) -> int, what it does)
COMMANDS = {
    "train": (
        "msdkern.train.command",
        "train a multi-exit network; without options, on scikit-learn's digits",
    ),
    "evaluate": (
        "msdkern.train.evaluate",
        "print a checkpoint's accuracy and cost at every exit, and what leaving early gives",
    ),
    "calibrate": (
        "msdkern.calibrate.command",
        "find when rows may leave early: temperatures and thresholds",
    ),
    "export": (
        "msdkern.infer.command",
        "write a checkpoint with its thresholds as a program for PyTorch, AOTInductor or ONNX",
    ),
    "compare": ("msdkern.train.compare", "train several losses over several seeds and tabulate"),
    "bench": ("msdkern.bench.command", "time msdkern against plain and compiled PyTorch"),
    "doctor": ("msdkern.doctor", "say what works on this computer and why the rest does not"),
}


class CommandError(Exception):
    """What stops a command in a way its user can mend: printed as one sentence, exit code 1."""

    told = False  # by another process of the same run


def build_parser(argv: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The parser of every command; only the command named in ``argv`` is imported."""
    parser = argparse.ArgumentParser(
        prog="msdkern", description="Train and run networks that answer at several depths."
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    chosen = next((word for word in argv if not word.startswith("-")), None)
    for name, (module, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text.capitalize() + ".")
        if name == chosen:
            importlib.import_module(module).add_arguments(command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; a mistake of the user ends in one sentence."""
    argv = list(sys.argv[1:] if argv is None else argv)
    command = "msdkern"
    try:
        parser = build_parser(argv)
        args = parser.parse_args(argv)
        if args.command is None:
            parser.print_help()
            return 0
        command = f"msdkern {args.command}"
        return importlib.import_module(COMMANDS[args.command][0]).run(args)
    except BrokenPipeError:
        # The reader of our output went away (`msdkern ... | head`): nothing is left to say.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"{command}: {where}{error.strerror or error}", file=sys.stderr)
        return 1
    except CommandError as error:
        if not error.told:
            print(f"{command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{command}: interrupted", file=sys.stderr)
        return 130


def entry() -> None:
    """The ``msdkern`` command."""
    sys.exit(main())

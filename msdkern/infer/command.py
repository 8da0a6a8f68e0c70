# SPDX-License-Identifier: Apache-2.0
"""``msdkern export``: a checkpoint and its thresholds as a program that needs no msdkern."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msdkern.cli import CommandError
from msdkern.train.options import add_checkpoint_arguments, given_fields

if TYPE_CHECKING:
    from msdkern.train.evaluate import Trained

FORMATS = {"program": ".exported.pt2", "aot": ".pt2", "onnx": ".onnx"}
RECIPES = ("compact", "cond")
VERIFIED = 32  # rows whose answers are compared before the file is handed out
CLOSE = 1e-4  # scores may differ by rounding, and rows whose score is so near a threshold may too


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint_arguments(parser, leave_out=("device", "executor", "threads", "amp"))
    parser.add_argument(
        "--thresholds", help="a file of msdkern calibrate (default: thresholds.json beside it)"
    )
    parser.add_argument(
        "--format", choices=sorted(FORMATS), default="program", help="what to write"
    )
    parser.add_argument(
        "--recipe",
        choices=RECIPES,
        default="compact",
        help="compact: any number of rows; cond: one row at a time",
    )
    parser.add_argument("--out", help="the file to write (default: beside the checkpoint)")


def run(args: argparse.Namespace) -> int:
    """Export, compare with the runner, and say where the file is."""
    from msdkern.train.evaluate import opened

    path = Path(args.checkpoint)
    thresholds = args.thresholds or str(path.with_name("thresholds.json"))
    out = Path(args.out) if args.out else path.with_suffix(FORMATS[args.format])
    if args.format != "onnx" and out.suffix != ".pt2":
        raise CommandError(f"--out: must end in .pt2 for --format {args.format}; got {out}")
    given = {**given_fields(args), "device": "cpu"}
    with opened(path, given) as trained:
        report = export(trained, thresholds, args.format, args.recipe, out)
    print(f"{report['file']}: {report['rows']} rows answered as by the runner")
    if args.json:
        print(json.dumps(report))
    sys.stdout.flush()
    return 0


def export(
    trained: Trained, thresholds: str, format: str, recipe: str, out: Path
) -> dict[str, Any]:
    """Writes the program and verifies it before and, through its runtime, after writing."""
    import torch

    from msdkern import infer
    from msdkern.calibrate import files
    from msdkern.infer.measure import batches_of
    from msdkern.train.data import Rows

    found = files.load(thresholds, trained.model, trained.dataset.fingerprint)
    held = trained.dataset.held_out
    images, _ = batches_of(trained, Rows(held.images[:VERIFIED], held.labels[:VERIFIED]))[0]
    # The memory format is part of a program; plain contiguous rows are what other runtimes send.
    images = images.contiguous()
    single = recipe == "cond"
    module = (infer.BatchOneExport if single else infer.CompactingExport)(trained.model, found)
    program = infer.export_program(module, images[:1] if single else images[:3])
    try:
        if format == "program":
            torch.export.save(program, out)
        elif format == "aot":
            infer.export_aot(program, out)
        else:
            infer.export_onnx(program, out)
        answers = _runtime(format, out)
    except ImportError as error:
        raise CommandError(f"--format {format}: {error}") from None
    parts = images.split(1) if single else [images, images[:1]]
    runner = infer.AdaptiveRunner(trained.model, found)
    for part in parts:
        _compare(answers(part), runner(part), found, out)
    return {
        "file": str(out),
        "format": format,
        "recipe": recipe,
        "rows": sum(map(len, parts)),
        "measure": found.measure,
        "thresholds": list(found.thresholds),
    }


def _runtime(format: str, path: Path) -> Any:
    """The written file as a function of a batch."""
    import torch

    if format == "program":
        return torch.export.load(path).module()
    if format == "aot":
        return torch._inductor.aoti_load_package(str(path))
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: [torch.as_tensor(y) for y in session.run(None, {name: x.numpy()})]


def _compare(found: Any, expected: Any, thresholds: Any, path: Path) -> None:
    """Rows whose score is not within rounding of a threshold must be answered alike."""
    import torch

    exit_index, prediction, score = (y.reshape(-1) for y in found)
    limits = torch.tensor(thresholds.thresholds, dtype=score.dtype)
    near = (expected.score[:, None] - limits).abs().amin(1) < CLOSE
    near |= (score[:, None] - limits).abs().amin(1) < CLOSE
    same = (exit_index == expected.exit_index) & (prediction == expected.prediction)
    same &= (score - expected.score).abs() < CLOSE
    if not bool((same | near).all()):
        wrong = int((~(same | near)).sum())
        raise CommandError(
            f"{path}: {wrong} of {len(score)} rows are answered otherwise; not usable"
        )

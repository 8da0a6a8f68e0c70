# SPDX-License-Identifier: Apache-2.0
"""Exported programs answer what the runner answers: torch.export, AOTInductor, ONNX."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import msdkern
from msdkern import calibrate, infer, models
from msdkern.models import Exit, MultiExitNetwork, Stage
from tests.cases import generator

SIZES = (1, 2, 5, 17)


def perceptron():
    """Three stages of one layer each, on rows of 8 numbers."""
    torch.manual_seed(0)
    stages = []
    for size in (8, 16, 16):
        trunk = nn.Sequential(nn.Linear(size, 16), nn.Tanh())
        stages.append(Stage(trunk, Exit(nn.Identity(), nn.Identity(), nn.Linear(16, 5))))
    model = MultiExitNetwork(stages).eval()
    with torch.no_grad():
        for stage in model.stages:
            stage.exit.classifier.weight.mul_(6)
    return model


def convolutional():
    """Two stages of one convolution each, on rows of 8 numbers as images of 1 x 8."""
    torch.manual_seed(0)
    stages = []
    for k, size in enumerate((1, 8)):
        trunk = nn.Sequential(nn.Conv2d(size, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        if k == 0:
            trunk.insert(0, nn.Unflatten(1, (1, 1, 8)))
        stages.append(Stage(trunk, Exit(nn.Identity(), nn.AdaptiveAvgPool2d(1), nn.Linear(8, 5))))
    model = MultiExitNetwork(stages).eval()
    with torch.no_grad():
        for stage in model.stages:
            stage.exit.classifier.weight.mul_(9)
    return model


def batch(rows, seed=0):
    return torch.randn(rows, 8, generator=generator(seed))


def between(model, measure, x):
    """Thresholds between the scores, so that no rounding decides; about half the rows leave."""
    with torch.no_grad():
        scores, _ = calibrate.exit_scores(model(x), measure)
    middle = scores.sort(1).values[:, len(x) // 2 - 1 : len(x) // 2 + 1]
    return middle.mean(1).tolist()


def assert_same(found, expected):
    for ours, true in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.as_tensor(ours), true, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "measure",
    ["confidence", "margin", "entropy", "normalized_entropy", "max_logit", "patience"],
)
def test_program_for_any_number_of_rows(measure):
    model = perceptron()
    limits = [1.0] * 3 if measure == "patience" else between(model, measure, batch(200))
    t = [1.0, 0.7, 2.0] if measure == "confidence" else 1.0
    runner = infer.AdaptiveRunner(model, limits, measure, temperature=t)
    module = infer.CompactingExport(model, limits, measure, temperature=t)
    program = infer.export_program(module, batch(3))
    assert not any("msdkern" in str(node.target) for node in program.graph.nodes)
    left = set()
    for rows in SIZES:
        x = batch(rows, rows)
        expected = runner(x)
        assert_same(module(x), expected)
        assert_same(program.module()(x), expected)
        left |= set(expected.exit_index.tolist())
    assert len(left) >= 2


def test_thresholds_can_be_changed_after_export():
    model = perceptron()
    program = infer.export_program(infer.CompactingExport(model, 0.5), batch(3))
    module, x = program.module(), batch(40)
    for limit, exit_index in ((-torch.inf, 0), (torch.inf, 2)):
        module.thresholds.fill_(limit)
        assert module(x)[0].tolist() == [exit_index] * 40
    module.thresholds.fill_(0.6)
    module.temperature.copy_(torch.tensor([1.5, 1.0, 0.5]))
    expected = infer.AdaptiveRunner(model, 0.6, temperature=[1.5, 1.0, 0.5])(x)
    assert_same(module(x), expected)


@pytest.mark.parametrize("name", ["resnet8", "msdnet_tiny"])
def test_a_convolutional_network(name):
    """The second hands on several maps, fine to coarse."""
    torch.manual_seed(1)
    model = models.create(name, 10, 3, width=8).eval()
    x = torch.randn(12, 3, 12, 12, generator=generator(2))
    limits = between(model, "margin", x)
    program = infer.export_program(infer.CompactingExport(model, limits, "margin"), x)
    runner = infer.AdaptiveRunner(model, limits, "margin")
    for rows in (12, 1):
        assert_same(program.module()(x[:rows]), runner(x[:rows]))


def test_one_row_by_branches():
    """By patience, whose memory travels into the branches."""
    model = perceptron()
    runner = infer.AdaptiveRunner(model, 1.0, "patience")
    program = infer.export_program(infer.BatchOneExport(model, 1.0, "patience"), batch(1))
    assert "cond" in program.graph_module.code
    found = [program.module()(batch(1, seed)) for seed in range(12)]
    expected = [runner(batch(1, seed)) for seed in range(12)]
    for ours, true in zip(found, expected, strict=True):
        assert_same(ours, true)
    assert len({int(e.exit_index) for e in expected}) >= 2


LOADER = """
import sys, torch
model = torch._inductor.aoti_load_package(sys.argv[1])
found = [model(x) for x in torch.load(sys.argv[2])]
assert "msdkern" not in sys.modules
torch.save(found, sys.argv[3])
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler")
@pytest.mark.parametrize("recipe", ["compact", "cond"])
def test_a_package_in_a_process_without_msdkern(recipe, tmp_path):
    model = convolutional()  # which layouts of an unknown number of rows once got wrong
    limits = between(model, "confidence", batch(200))
    made = {"compact": infer.CompactingExport, "cond": infer.BatchOneExport}[recipe](model, limits)
    inputs = [batch(n, n) for n in (SIZES if recipe == "compact" else (1, 1, 1))]
    program = infer.export_program(made, batch(3 if recipe == "compact" else 1))
    package = infer.export_aot(program, tmp_path / "model.pt2")
    torch.save(inputs, tmp_path / "in.pt")
    files = [str(package), str(tmp_path / "in.pt"), str(tmp_path / "out.pt")]
    done = subprocess.run(
        [sys.executable, "-c", LOADER, *files], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    runner = infer.AdaptiveRunner(model, limits)
    for ours, x in zip(torch.load(tmp_path / "out.pt"), inputs, strict=True):
        assert_same(ours, runner(x))


@pytest.mark.parametrize("recipe", ["compact", "cond"])
def test_onnxruntime(recipe, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model = perceptron()
    limits = between(model, "confidence", batch(200))
    made = {"compact": infer.CompactingExport, "cond": infer.BatchOneExport}[recipe](model, limits)
    program = infer.export_program(made, batch(3 if recipe == "compact" else 1))
    path = infer.export_onnx(program, tmp_path / "model.onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    assert [o.name for o in session.get_outputs()] == ["exit_index", "prediction", "score"]
    runner = infer.AdaptiveRunner(model, limits)
    for n in SIZES if recipe == "compact" else (1, 1):
        x = batch(n, n)
        found = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        assert_same([np.atleast_1d(f) for f in found], runner(x))


def test_bad_input_is_one_sentence(tmp_path):
    model = perceptron()
    wrong = {
        "export_program: module must be a CompactingExport or a BatchOneExport; got 'Linear'": (
            lambda: infer.export_program(nn.Linear(2, 2), batch(2))
        ),
        "export_program: the example of a BatchOneExport must have one row; got 2": (
            lambda: infer.export_program(infer.BatchOneExport(model, 0.5), batch(2))
        ),
        "export_program: the example of a CompactingExport must have at least two rows; got 1": (
            lambda: infer.export_program(infer.CompactingExport(model, 0.5), batch(1))
        ),
        "CompactingExport: score must be given exactly when measure is 'score'; got 'score'": (
            lambda: infer.CompactingExport(model, 0.5, "score")
        ),
        "export_aot: path must end in .pt2; got 'model.so'": (
            lambda: infer.export_aot(None, "model.so")
        ),
    }
    for sentence, call in wrong.items():
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            call()
        assert str(caught.value) == sentence


class Rogue(nn.Module):
    """A stage with an op that has no formula for programs."""

    def forward(self, features, logits):
        return features, [*logits, msdkern.multi_exit_softmax([features])[0]]


def test_a_program_that_would_need_msdkern_is_refused():
    module = infer.CompactingExport(MultiExitNetwork([Rogue()]), 0.5)
    with pytest.raises(ValueError, match=r"must not need msdkern; got 'msdkern.multi_exit_soft"):
        infer.export_program(module, batch(3))

# SPDX-License-Identifier: Apache-2.0
"""Tables and pictures."""

import io
import sys

import numpy as np
import pytest
from PIL import Image

from msdkern.train import report
from msdkern.train.log import Log, Progress, percents, read_log

REPORT = {
    "exits": [
        {"exit": 1, "accuracy": 0.9, "cross_entropy": 0.31, "confidence": 0.875, "madds": 763520},
        {"exit": 2, "accuracy": 0.975, "cross_entropy": 0.1, "confidence": 0.95, "madds": 12345678},
    ],
    "rows": 1797,
}


def records(epochs):
    return [
        {
            "kind": "epoch",
            "epoch": epoch,
            "step": 10 * epoch,
            "loss": 4 / epoch,
            "held_out": {"accuracy": [1 - 0.5 / epoch, 1 - 0.4 / epoch, 1 - 0.3 / epoch]},
        }
        for epoch in range(1, epochs + 1)
    ]


def test_table():
    assert report.table(REPORT).splitlines() == [
        "exit  accuracy  cross entropy  confidence  multiply-adds",
        "   1   90.00 %         0.3100      0.8750          764 k",
        "   2   97.50 %         0.1000      0.9500         12.3 M",
        "1,797 held-out images",
    ]
    assert report.table({**REPORT, "best_accuracy": 0.9}).endswith(
        "1,797 held-out images; no classifier can pass 90.00 % on average"
    )


@pytest.mark.parametrize(
    ("value", "text"), [(12, "12"), (1500, "1.5 k"), (999_999, "1e+03 k"), (2.5e9, "2.5 G")]
)
def test_counts(value, text):
    assert report.count(value) == text


def inked(path):
    """Share of pixels that are not white."""
    with Image.open(path) as file:
        pixels = np.asarray(file.convert("L"))
    assert min(pixels.shape) > 400
    return (pixels < 250).mean()


@pytest.mark.parametrize("exits", [1, 2])
def test_picture_of_costs(tmp_path, exits):
    chosen = {**REPORT, "exits": REPORT["exits"][:exits], "best_accuracy": 0.99}
    report.draw_cost(chosen, "title", tmp_path / "cost.png")
    assert 0.005 < inked(tmp_path / "cost.png") < 0.3
    assert [p.name for p in tmp_path.iterdir()] == ["cost.png"]


@pytest.mark.parametrize("epochs", [1, 12])
def test_picture_of_curves(tmp_path, epochs):
    report.draw_curves(records(epochs), "title", tmp_path / "curves.png")
    assert 0.005 < inked(tmp_path / "curves.png") < 0.3


def test_without_matplotlib_a_sentence_says_so(monkeypatch):
    assert report.missing_matplotlib() is None
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    sentence = report.missing_matplotlib()
    assert "matplotlib" in sentence
    assert "pip install 'msdkern[train]'" in sentence


def test_log_is_cut_to_what_the_checkpoint_knew(tmp_path):
    path = tmp_path / "log.jsonl"
    log = Log(path)
    log.write({"step": 1})
    size = log.sync()
    log.write({"step": 2})
    log.file.write(b'{"step": 3, "lo')  # killed in the middle of a line
    log.close()
    assert read_log(path) == [{"step": 1}, {"step": 2}]
    log = Log(path, size)
    log.write({"step": "two"})
    log.close()
    assert read_log(path) == [{"step": 1}, {"step": "two"}]


def test_percents():
    assert percents([0.5, 0.98765]) == "50.0 98.8 %"


class Terminal(io.StringIO):
    def isatty(self):
        return True


EPOCH = {
    "epoch": 1,
    "loss": 0.5,
    "held_out": {"accuracy": [0.5, 0.75]},
    "rows_per_second": 1234.5,
}
LINE = "epoch 1/2  loss 0.5000  held out 50.0 75.0 %  1,234 rows/s\n"


@pytest.mark.parametrize(
    ("screen", "tqdm"), [(Terminal, True), (Terminal, False), (io.StringIO, True)]
)
def test_progress(monkeypatch, screen, tqdm):
    monkeypatch.setattr(sys, "stderr", screen())
    if not tqdm:
        monkeypatch.setitem(sys.modules, "tqdm", None)
    progress = Progress(10, 4, 16, quiet=False)
    progress.show({"loss": 0.25, "accuracy": [0.5, 0.75]})
    progress.advance(16)
    progress.end_epoch(EPOCH, 2)
    progress.close()
    text = sys.stderr.getvalue()
    if screen is Terminal and tqdm:
        assert "/160" in text
        assert LINE in text
    else:
        assert text == LINE


def test_quiet_is_quiet(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    progress = Progress(10, 0, 16, quiet=True)
    progress.end_epoch(EPOCH, 2)
    progress.close()
    assert sys.stderr.getvalue() == ""

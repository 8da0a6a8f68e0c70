# SPDX-License-Identifier: Apache-2.0
"""calibrate, evaluate --thresholds and export as their users meet them."""

import json
import shutil
import subprocess
import sys

import pytest
import torch

from msdkern import cli
from msdkern.calibrate.sets import SEEN
from msdkern.train import data
from tests.cli.test_train_cli import ENVIRONMENT, FAST, msdkern


@pytest.fixture(autouse=True)
def leave_no_trace():
    """One thread as in the processes: the synthetic images depend on how many factorise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    data._load.cache_clear()


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """A trained checkpoint, and what calibrate printed."""
    folder = tmp_path_factory.mktemp("calibrate") / "run"
    assert msdkern("train", *FAST, "--validation", "90", "--out", folder).returncode == 0
    done = msdkern("calibrate", folder / "last.pt", "--budget", "0.8", "--threads", "1", "--json")
    assert done.returncode == 0, done.stderr
    return folder, done


def run(capsys, *words):
    """In this process: exit code, lines on standard output, standard error."""
    code = cli.main([str(word) for word in words])
    out, err = capsys.readouterr()
    return code, out.splitlines(), err


def test_calibrate_prints_tables_and_json(calibrated):
    folder, done = calibrated
    *text, last = done.stdout.splitlines()
    report = json.loads(last)
    assert text[0].split()[:2] == ["exit", "accuracy"]
    assert text[4].split()[:3] == ["accuracy", "multiply-adds", "ms"]
    assert text[5].split()[:2] == ["whole", "network"]
    assert text[6].split()[0] == "thresholds"
    assert text[-1] == f"thresholds: {folder / 'thresholds.json'}"
    assert (report["calibrated_on"], report["rows"]) == ("validation", 2700)
    assert done.stderr == ""
    [found] = report["early"]
    assert found["madds"] <= 0.9 * report["exits"][-1]["madds"]
    assert sum(found["share"]) == pytest.approx(1.0)
    assert 0 < found["stage_milliseconds"] < found["milliseconds"]
    names = {"exit", "accuracy", "madds", "milliseconds", "temperature", "ece", "nll", "brier",
             "ece_uncalibrated", "nll_uncalibrated", "brier_uncalibrated"}  # fmt: skip
    assert report["exits"][0].keys() == names
    assert all(row["nll"] <= row["nll_uncalibrated"] + 0.02 for row in report["exits"])
    stored = json.loads((folder / "thresholds.json").read_text())
    assert stored["predicted"]["madds"] <= 0.8 * report["exits"][-1]["madds"]
    assert stored["thresholds"] == found["thresholds"]
    assert stored["method"] == {"name": "accuracy", "budget": 0.8, "rows": "validation"}


def test_rows_that_training_did_not_set_aside_are_named(tmp_path, capsys):
    folder = tmp_path / "run"
    assert run(capsys, "train", *FAST, "--out", folder, "--quiet")[0] == 0
    for words in (["calibrate"], ["evaluate", "--thresholds", folder / "thresholds.json"]):
        code, lines, err = run(capsys, *words, folder / "last.pt", "--threads", 1, "--json")
        report = json.loads(lines[-1])
        report = report["early"] if words[0] == "evaluate" else report
        assert (code, report["calibrated_on"], report["rows"]) == (0, "held-out", 900)
        assert err.startswith(f"msdkern {words[0]}: {SEEN}\n")


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["--method", "budgeted", "--ratio", "0.5", "--measure", "entropy"], "budgeted"),
        (["--method", "risk", "--max-loss", "0.05", "--measure", "margin"], "risk"),
        (["--amp", "--budget", "0.9"], "accuracy"),
        (["--method", "match", "--max-loss", "0.05"], "match"),
        (["--no-temperature", "--measure", "max_logit", "--budget", "1"], "accuracy"),
    ],
)
def test_other_methods(calibrated, tmp_path, capsys, words, name):
    folder, _ = calibrated
    out = tmp_path / "other.json"
    code, lines, err = run(
        capsys, "calibrate", folder / "last.pt", "--threads", 1, "--out", out, "--json", *words
    )
    assert code == 0, err
    [found] = json.loads(lines[-1])["early"]
    assert found["method"]["name"] == name
    stored = json.loads(out.read_text())
    assert stored["method"] == found["method"]
    assert (stored["temperature"] == [1.0] * 3) == ("--no-temperature" in words)
    if name == "risk":
        assert stored["method"]["loss"] <= stored["method"]["upper_bound"] <= 0.05


def test_evaluate_leaves_early_by_the_file(calibrated, tmp_path, capsys):
    folder, done = calibrated
    words = ("--thresholds", folder / "thresholds.json", "--threads", 1, "--out", tmp_path)
    code, lines, err = run(capsys, "evaluate", folder / "last.pt", *words, "--json")
    assert code == 0, err
    report = json.loads(lines[-1])
    [found], [before] = report["early"]["early"], json.loads(done.stdout.splitlines()[-1])["early"]
    timeless = ("name", "accuracy", "madds", "share", "thresholds", "method")
    assert [found[key] for key in timeless] == [before[key] for key in timeless]
    assert report["early"]["rows"] == report["rows"] == 2700
    assert report["early"]["curve"] == []


def test_evaluate_draws_what_budgets_buy(calibrated, tmp_path, capsys):
    folder, _ = calibrated
    words = ("--budget", "0.7,1", "--threads", 1, "--out", tmp_path / "new", "--batch-size", 300)
    code, lines, err = run(capsys, "evaluate", folder / "last.pt", *words, "--json")
    assert code == 0, err
    early = json.loads(lines[-1])["early"]
    assert [found["name"] for found in early["early"]] == ["budget 0.7", "budget 1"]
    assert early["early"][0]["madds"] <= 0.8 * early["exits"][-1]["madds"]
    assert len(early["curve"]) == 39
    assert sum("milliseconds" in point for point in early["curve"]) == 10
    assert lines[-2] == "2,700 rows, batches of 300, the fastest of 3 runs in turn"
    for name in ("budgeted.png", "reliability.png", "exits.png"):
        assert (tmp_path / "new" / name).read_bytes().startswith(b"\x89PNG"), name
        assert str(tmp_path / "new" / name) in err


@pytest.mark.parametrize("text", ["0", "1.5", "half", "0.5,"])
def test_budgets_are_shares(calibrated, capsys, text):
    with pytest.raises(SystemExit):
        cli.main(["evaluate", "none.pt", "--budget", text])
    sentence = f"argument --budget: must be numbers above 0, at most 1; got {text!r}"
    assert capsys.readouterr().err.splitlines()[-1].endswith(sentence)


def test_a_file_of_another_run_is_refused(calibrated, tmp_path, capsys):
    folder, _ = calibrated
    record = json.loads((folder / "thresholds.json").read_text())
    other = tmp_path / "thresholds.json"
    for name, words in (("model", "weights"), ("data", "images")):
        other.write_text(json.dumps({**record, name: "0" * 64}))
        for command in ("evaluate", "export"):
            code, _, err = run(capsys, command, folder / "last.pt", "--thresholds", other)
            assert code == 1
            own = record[name][:12]
            assert err == (
                f"msdkern {command}: {other}: were found with other {words}: "
                f"{name} {'0' * 12}, not {own}\n"
            )


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--budget", "0.01"], "maximize_accuracy: budget cannot be met: every row costs at least"),
        (["--method", "budgeted", "--ratio", "-1"], "geometric_fractions: ratio must be positive"),
        (["--method", "risk", "--measure", "entropy"], "--measure: must lie between 0 and 1"),
        (["--method", "risk", "--delta", "2"], "risk_controlled_thresholds: delta must be between"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(calibrated, tmp_path, capsys, words, sentence):
    folder, _ = calibrated
    out = tmp_path / "none.json"
    code, _, err = run(capsys, "calibrate", folder / "last.pt", "--out", out, *words)
    assert code == 1
    assert err.startswith(f"msdkern calibrate: {sentence}")
    assert err.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize(("format", "recipe"), [("program", "compact")])
def test_export_is_verified(calibrated, tmp_path, capsys, format, recipe):
    folder, _ = calibrated
    out = tmp_path / "model.pt2"
    words = ("export", folder / "last.pt", "--format", format, "--recipe", recipe, "--out", out)
    code, lines, err = run(capsys, *words, "--json")
    assert code == 0, err
    report = json.loads(lines[-1])
    assert report["rows"] == (33 if recipe == "compact" else 32)
    assert report["file"] == str(out)
    script = (
        "import sys, torch; torch.export.load(sys.argv[1]); assert 'msdkern' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script, out], env=ENVIRONMENT, check=False)
    assert done.returncode == 0


def test_export_to_onnx(calibrated, tmp_path, capsys):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    folder, _ = calibrated
    out = tmp_path / "model.onnx"
    code, lines, err = run(capsys, "export", folder / "last.pt", "--format", "onnx", "--out", out)
    assert code == 0, err
    assert lines[-1] == f"{out}: 33 rows answered as by the runner"


def test_export_needs_thresholds_and_the_right_name(calibrated, tmp_path, capsys):
    folder, _ = calibrated
    alone = tmp_path / "last.pt"
    shutil.copy(folder / "last.pt", alone)
    code, _, err = run(capsys, "export", alone)
    missing = tmp_path / "thresholds.json"
    assert (code, err) == (1, f"msdkern export: {missing}: there is no such file\n")
    code, _, err = run(capsys, "export", folder / "last.pt", "--out", tmp_path / "model.bin")
    assert code == 1
    assert err.startswith("msdkern export: --out: must end in .pt2 for --format program")


def test_help_does_not_load_torch():
    script = (
        "import sys; from msdkern.cli import main\n"
        "for words in (['calibrate', '--help'], ['export', '--help']):\n"
        "    try: main(words)\n"
        "    except SystemExit as done: assert done.code == 0\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "--max-loss" in done.stdout

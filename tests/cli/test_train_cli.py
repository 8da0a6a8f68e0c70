# SPDX-License-Identifier: Apache-2.0
"""The commands as their users meet them: exit codes, one sentence, one line of JSON."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from msdkern import cli
from msdkern.train import data

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
FAST = ["--data", "synthetic", "--held-out", "0.9", "--epochs", "1", "--threads", "1"]


def msdkern(*words, **settings):
    command = [sys.executable, "-m", "msdkern", *map(str, words)]
    settings = {
        "env": ENVIRONMENT,
        "capture_output": True,
        "text": True,
        "timeout": 120,
        **settings,
    }
    return subprocess.run(command, **settings)


@pytest.fixture(autouse=True)
def leave_no_trace():
    yield
    data._load.cache_clear()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run and what its command printed."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    return folder, msdkern("train", *FAST, "--out", folder, "--json")


def test_help_does_not_load_torch():
    script = (
        "import sys; from msdkern.cli import main\n"
        "for words in ([], ['--help'], ['train', '--help'], ['compare', '--help']):\n"
        "    try: main(words)\n"
        "    except SystemExit as done: assert done.code == 0\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for name, (_, text) in cli.COMMANDS.items():
        assert name in done.stdout
        assert text.split()[0] in done.stdout
    assert "--checkpoint-every" in done.stdout


def test_train_prints_a_table_and_json(trained):
    folder, done = trained
    assert done.returncode == 0, done.stderr
    *table, last = done.stdout.splitlines()
    report = json.loads(last)
    assert report.keys() >= {"exits", "checkpoint", "seconds"}
    names = {"exit", "accuracy", "cross_entropy", "confidence", "madds"}
    assert [row.keys() for row in report["exits"]] == [names] * 3
    assert table[0].split() == [
        "exit",
        "accuracy",
        "cross",
        "entropy",
        "confidence",
        "multiply-adds",
    ]
    assert Path(report["checkpoint"]) == folder / "last.pt"
    for name in ("accuracy.png", "curves.png", "log.jsonl", "config.json", "result.json"):
        assert (folder / name).stat().st_size > 0
    assert done.stderr.splitlines()[0].startswith("epoch 1/1  loss ")
    assert "Traceback" not in done.stderr


def test_evaluate_prints_the_same_table(trained):
    folder, done = trained
    again = msdkern("evaluate", folder / "last.pt", "--json")
    assert again.returncode == 0, again.stderr
    assert again.stdout.splitlines()[:-1] == done.stdout.splitlines()[:-1]
    one, other = (json.loads(text.stdout.splitlines()[-1]) for text in (done, again))
    assert one["exits"] == other["exits"]
    assert other["checkpoint"] == str(folder / "last.pt")
    assert other["seconds"] > 0


def assert_one_sentence(capsys, words, message):
    assert cli.main([str(word) for word in words]) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("msdkern " + str(words[0]))
    assert captured.out == ""


def test_finished_folder(trained, capsys):
    folder, _ = trained
    words = ["train", *FAST, "--out", folder]
    assert_one_sentence(capsys, words, "holds a finished run; choose another --out")


def test_resume_of_a_finished_run_prints_its_table(trained, capsys):
    folder, done = trained
    assert cli.main(["train", "--resume", "--out", str(folder), "--quiet", "--json"]) == 0
    assert capsys.readouterr().out == done.stdout


def test_resume_with_another_option(trained, capsys):
    folder, _ = trained
    words = ["train", "--resume", "--out", folder, "--lr", "0.7"]
    assert_one_sentence(capsys, words, "--resume: --lr is 0.1 in the run that is there; got 0.7")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--data", "cifar10"], "--root: --data cifar10 needs a folder with"),
        (["train", "--data", "cifar10", "--root", "/nowhere"], "'/nowhere' is not a folder"),
        (["train", "--root", "x"], "--root: --data digits reads no folder; got 'x'"),
        (["train", "--epochs", "0"], "--epochs: must be at least 1; got 0"),
        (["train", "--loss", "kd"], "learns from the logits of another network"),
        (["train", "--config", "none.json"], "none.json: No such file or directory"),
        (["evaluate", "none.pt"], "none.pt: there is no such file"),
        (["evaluate", __file__], "not a checkpoint, or a damaged one"),
    ],
)
def test_mistakes_end_in_one_sentence(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    assert_one_sentence(capsys, words, message)


def test_unknown_words_show_the_choices(capsys):
    with pytest.raises(SystemExit) as done:
        cli.main(["trian"])
    assert done.value.code == 2
    assert "choose from" in capsys.readouterr().err


def test_missing_scikit_learn(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    words = ["train", "--data", "digits", "--quiet"]
    assert_one_sentence(capsys, words, "needs scikit-learn: pip install 'msdkern[train]'")


def test_missing_matplotlib_skips_only_the_pictures(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["train", *FAST, "--out", str(tmp_path / "run")]) == 0
    captured = capsys.readouterr()
    assert "no pictures were drawn: they need matplotlib" in captured.err
    assert captured.out.startswith("exit  accuracy")
    assert not list((tmp_path / "run").glob("*.png"))


def test_file_size_limit_ends_in_one_sentence(tmp_path):
    """A real refusal by the system: files may not grow beyond 1 MB, the checkpoint would."""
    script = (
        "import resource, sys; from msdkern.cli import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    words = ["train", *FAST, "--out", str(tmp_path / "run"), "--quiet"]
    done = subprocess.run(
        [sys.executable, "-c", script, *words], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"msdkern train: {tmp_path / 'run' / 'next.pt'}: File too large;")
    assert done.stderr.endswith(
        "what was saved before is whole: make room and continue with --resume\n"
    )
    assert done.stderr.count("\n") == 1
    assert not list((tmp_path / "run").glob("*.pt*"))


def test_default_folders_do_not_collide(tmp_path, monkeypatch):
    from msdkern.train.command import choose_config

    monkeypatch.chdir(tmp_path)
    first = choose_config({"quiet": True}, resume=False)
    assert first.out == str(Path("runs/digits-resnet8-msd-seed0"))
    Path(first.out).mkdir(parents=True)
    second = choose_config({"quiet": True}, resume=False)
    assert second.out == first.out + "-2"
    assert choose_config({"quiet": True}, resume=True).out == first.out
    Path(second.out).mkdir()
    assert choose_config({"quiet": True}, resume=True).out == second.out


def test_reader_that_goes_away(trained):
    folder, _ = trained
    command = f"{sys.executable} -m msdkern evaluate {folder / 'last.pt'} | true"
    done = subprocess.run(command, shell=True, env=ENVIRONMENT, capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr

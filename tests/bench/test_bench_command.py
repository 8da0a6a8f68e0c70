# SPDX-License-Identifier: Apache-2.0
"""`msdkern bench` and `pytest bench` from end to end, on a case that takes no time."""

import argparse
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from bench import cases, command, contenders, machine, runner
from bench.cases import Case

ROOT = Path(command.__file__).resolve().parent.parent
SMALL = [
    Case("small", 2, 3, 4, formulations=()),
    Case("small_statistics", 2, 3, 4, family="statistics", formulations=()),
]


def parse(*words):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(words)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(cases, "select", lambda names, device, quick: SMALL)


def test_run_writes_files_and_one_json_line(small, tmp_path, capsys):
    args = parse("--seconds", "0.01", "--executor", "eager", "--json", "--out", str(tmp_path))
    assert command.run(args) == 0
    out, err = capsys.readouterr()
    results = json.loads(out.splitlines()[-1])
    assert results == json.loads((tmp_path / "bench.json").read_text())
    assert "## Where we lose" in out
    assert "[1/2] small (2, 3, 4)" in err
    assert [entry["case"]["name"] for entry in results["cases"]] == ["small", "small_statistics"]
    first = {c["name"]: c for c in results["cases"][0]["contenders"]}
    assert set(first) == {"copy", "msdkern eager", "naive", "shared"}
    assert set(first["msdkern eager"]["seconds"]) == {"forward", "backward", "both"}
    assert first["naive"]["peak_bytes"] > 0
    assert first["naive"]["errors"]["gradient"] < 1e-5


def test_results_name_no_computer():
    text = json.dumps([machine.machine(), machine.software()])
    assert "node" not in text
    assert str(Path.home()) not in text
    assert socket.gethostname() not in [*machine.machine().values(), *machine.software().values()]


def test_compare_is_printed(small, tmp_path, capsys):
    assert (
        command.run(parse("--seconds", "0.01", "--executor", "eager", "--out", str(tmp_path))) == 0
    )
    earlier = str(tmp_path / "bench.json")
    args = parse("--seconds", "0.01", "--executor", "eager", "--compare", earlier)
    assert command.run(args) == 0
    assert "| `small` | both | msdkern eager |" in capsys.readouterr().out


def test_a_wrong_kernel_fails_the_run(small, monkeypatch, capsys):
    def wrong(problem):
        return lambda: sum(z.sum() for z in problem.logits)

    monkeypatch.setitem(contenders.OURS, "loss", wrong)
    assert command.run(parse("--seconds", "0.01", "--executor", "eager")) == 1
    assert "Left out in `small`: *msdkern eager*: value is wrong" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--cases", "nothing"], "case must be one of"),
        (["--threads", "0"], "threads must be at least 1; got 0"),
        (["--seconds", "-1"], "seconds must be positive; got -1.0"),
        (["--executor", "nobody"], "one of cpu, cuda, eager, triton; got 'nobody'"),
        (["--compare", "missing.json"], "missing.json"),
    ],
)
def test_bad_options_get_one_sentence(words, sentence, capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert command.run(parse(*words)) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert sentence in err
    assert err.count("\n") == 1


def test_list_prints_every_case(capsys):
    assert command.run(parse("--list")) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()] == [c.name for c in cases.select()]


def test_an_executor_asked_for_is_the_one_timed():
    assert runner.executors_for(SMALL[0], runner.Settings(executors=("eager",))) == ("eager",)
    assert runner.executors_for(SMALL[0], runner.Settings()) in (("cpu",), ("eager",))


def test_pytest_collects_and_runs_the_same_cases(tmp_path):
    saved = tmp_path / "saved.json"
    options = [
        "-p",
        "no:cacheprovider",
        "-k",
        "overhead and (copy or naive)",
        "--benchmark-max-time=0",
    ]
    # In one of several processes that share the tests nothing would be timed.
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "bench", *options, f"--benchmark-json={saved}"],
        cwd=ROOT,
        env=alone,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(saved.read_text())
    assert [b["group"] for b in found["benchmarks"]] == ["loss/5x1x2/float32/mutual"] * 2
    assert "node" not in found["machine_info"]
    assert socket.gethostname() not in found["machine_info"].values()

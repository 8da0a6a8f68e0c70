"""`msdkern doctor`: what it says, what it hides, and when it fails."""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path

import pytest
import torch

import msdkern
from msdkern import _source, cli, doctor, executors

GIB = 2**30


def facts(**changed):
    """A computer with a GPU, where everything works."""
    device = {"name": "Some GPU", "capability": (9, 0), "memory": 80 * GIB, "binary": 90}
    device |= {"status": "ok", "processors": 132}
    module = {"reason": None, "stale": False, "source_hash": "0123456789abcdef"}
    return {
        "versions": {"torch": "2.13.0", "triton": None},
        "build": {"compiler": "GNU 13.2", "nvcc": "12.8.61", "missing": {}},
        "modules": {"_cpu": module, "_cuda": module},
        "cpu": {"isas": ["avx2", "baseline"], "chosen": "avx2", "openmp": True},
        "cuda": {
            "architectures": [80, 90],
            "runtime": 12080,
            "driver": 13010,
            "status": "ok",
            "devices": [device],
        },
        "executors": {"multi_exit_loss": {"eager": None, "cpu": None}},
        "order": ["first for losses on cuda (measured):"],
        "self_test": {"eager": {"device": "cpu", "max_error": 3e-8, "ok": True}},
        "extras": {"train": {"missing": [], "install": None}},
        **changed,
    }


def text(**changed):
    return "\n".join(doctor.words(facts(**changed)))


def test_command_reports_this_installation(capsys):
    assert cli.main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert f"torch     {torch.__version__}" in said
    assert f"msdkern   {msdkern.__version__}" in said
    assert "eager     ok on cpu" in said


def test_json_is_one_object_on_the_last_line(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(found) == set(facts())
    assert found["executors"] == executors.table()
    assert found["order"] == executors.shapes()
    assert found["self_test"]["eager"]["max_error"] <= doctor.TOLERANCE


def test_every_available_executor_is_tested_and_right():
    table = executors.table()["multi_exit_loss"]
    available = {name for name, reason in table.items() if reason is None}
    results = doctor.self_tests()
    assert set(results) == available
    assert [name for name, result in results.items() if not result["ok"]] == []


def test_self_test_sees_a_wrong_gradient(monkeypatch):
    right = doctor.loss_and_gradient

    def wrong(executor, dtype, device):
        vector = right(executor, dtype, device)
        vector[-1] += 1e-4 if dtype == torch.float32 else 0.0
        return vector

    monkeypatch.setattr(doctor, "loss_and_gradient", wrong)
    result = doctor.self_test("eager", "cpu")
    assert not result["ok"]
    assert result["max_error"] == pytest.approx(1e-4, rel=0.01)


def test_exit_code_is_1_when_eager_fails(monkeypatch, capsys):
    def broken(executor, device):
        raise RuntimeError("no luck\nmore")

    monkeypatch.setattr(doctor, "self_test", broken)
    assert doctor.run(argparse.Namespace(json=False)) == 1
    assert "eager     FAILED on cpu, RuntimeError: no luck\n" in capsys.readouterr().out


@pytest.mark.parametrize("as_json", [False, True])
def test_shows_no_home_and_no_hostname(monkeypatch, capsys, as_json):
    reason = f"no compiler found (looked for {Path.home()}/bin/g++)"
    absent = {"reason": reason, "stale": False}
    found = facts(modules={"_cpu": absent, "_cuda": absent})
    monkeypatch.setattr(doctor, "examine", lambda: found)
    doctor.run(argparse.Namespace(json=as_json))
    said = capsys.readouterr().out
    assert "looked for ~/bin/g++" in said
    assert str(Path.home()) not in said
    assert platform.node() not in json.dumps(doctor.versions())


def test_words_of_a_gpu():
    said = text()
    assert "compiled for sm_80, sm_90; runtime 12.8" in said
    assert "ok, driver serves CUDA 13.1" in said
    assert "Some GPU, sm_90, 80 GiB: runs our sm_90 code" in said


def test_words_of_a_gpu_that_is_too_old():
    cuda = facts()["cuda"]
    why = "no kernel image is available for execution on the device"
    cuda["devices"][0] |= {"capability": (7, 0), "binary": 0, "status": why}
    assert f"Some GPU, sm_70, 80 GiB: {why}" in text(cuda=cuda)


def test_words_without_a_driver():
    cuda = facts()["cuda"] | {"status": "no driver", "driver": 0, "devices": []}
    assert "  no driver\n" in text(cuda=cuda)


def test_words_without_native_modules():
    absent = {"reason": "no compiler found (looked for c++)", "stale": False}
    said = text(modules={"_cpu": absent, "_cuda": absent}, cpu={}, cuda={})
    assert "_cpu      absent: no compiler found (looked for c++)" in said
    assert "--no-cache-dir" in said
    assert "no C++ kernels; plain PyTorch computes" in said
    assert "no CUDA module" in said


def test_words_of_one_thread():
    cpu = facts()["cpu"] | {"openmp": False}
    assert "OpenMP: no, one thread computes" in text(cpu=cpu)


def test_words_of_executors():
    table = {"multi_exit_loss": {"eager": None, "cpu": "not built"}}
    said = text(executors=table)
    assert "multi_exit_loss         eager\n" in said
    assert "cpu: not built" in said


def test_words_of_a_missing_extra():
    extra = {"missing": ["tqdm"], "install": 'pip install "msdkern[train]"'}
    assert 'train     lacks tqdm: pip install "msdkern[train]"' in text(extras={"train": extra})


def test_extras_are_read_from_the_metadata(monkeypatch):
    requirements = [
        "torch>=2.8",
        'tqdm; extra == "train"',
        'no-such-package; extra == "train"',
        'msdkern[train]; extra == "all"',
        'pytest>=8; extra == "test"',
        'other; (sys_platform == "plan9" and machine == "x") and extra == "test"',
    ]
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: requirements)
    assert doctor.extras() == {
        "train": {"missing": ["no-such-package"], "install": 'pip install "msdkern[train]"'},
        "test": {"missing": [], "install": None},
    }


def test_record_is_missing_or_broken(tmp_path):
    why = "the package was never installed here"
    assert doctor.build_record(tmp_path)["missing"] == {"_cpu": why, "_cuda": why}
    (tmp_path / "_build.json").write_text("{")
    assert doctor.build_record(tmp_path)["missing"]["_cpu"] == why


def test_reason_of_a_module_built_for_another_python():
    found = doctor.native_module("_none", {"python": "cpython-30", "missing": {"_none": None}})
    assert found["reason"].startswith("built for cpython-30, not for ")


def test_reason_comes_from_the_record():
    found = doctor.native_module("_none", {"missing": {"_none": "no compiler"}})
    assert found == {"reason": "no compiler", "stale": False}


class TestSourceHash:
    @pytest.fixture
    def tree(self, tmp_path):
        (tmp_path / "csrc" / "cpu").mkdir(parents=True)
        (tmp_path / "CMakeLists.txt").write_text("project(x)\n")
        (tmp_path / "csrc" / "cpu" / "a.cpp").write_text("int a;\n")
        (tmp_path / "csrc" / "b.h").write_text("int b;\n")
        return tmp_path

    def test_sources_lie_beside_a_checkout(self, tree):
        assert _source.present(tree)
        assert not _source.present(tree / "csrc")

    @pytest.mark.parametrize("name", ["CMakeLists.txt", "csrc/cpu/a.cpp", "csrc/b.h"])
    def test_changes_with_every_source(self, tree, name):
        before = _source.source_hash(tree)
        assert _source.source_hash(tree) == before
        (tree / name).write_text("other\n")
        assert _source.source_hash(tree) != before

    def test_changes_with_a_name_and_with_where_text_lies(self, tree):
        before = _source.source_hash(tree)
        (tree / "csrc" / "b.h").rename(tree / "csrc" / "c.h")
        assert _source.source_hash(tree) != before

    def test_ignores_prose_and_line_ends(self, tree):
        before = _source.source_hash(tree)
        (tree / "csrc" / "README.md").write_text("words\n")
        (tree / "csrc" / "b.h").write_bytes(b"int b;\r\n")
        assert _source.source_hash(tree) == before

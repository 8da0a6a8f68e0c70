# SPDX-License-Identifier: Apache-2.0
"""`bench/gpu.sh` and the GPU's timing, without a GPU: stages, resuming, and a pretended device."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from bench import device, gpu, timing
from bench.cases import CASES, Case
from bench.contenders import Contender
from bench.gpu import Stage
from bench.problem import Problem


def python(program):
    return (sys.executable, "-c", program)


@pytest.fixture
def stages(tmp_path):
    """Three stages; the second fails until a file appears."""
    wanted = f"import os, sys; sys.exit(not os.path.exists({str(tmp_path / 'mended')!r}))"
    return [
        Stage("first thing", python("print('seen')")),
        Stage("second", python(wanted)),
        Stage("third", python("pass"), needs=("no_such_module_or_program",)),
    ]


def test_a_run_resumes_where_it_stopped(stages, tmp_path):
    state, said = tmp_path / "state", []
    first = gpu.run_all(stages, state, say=said.append)
    assert first["first thing"] == "done"
    assert first["second"] == "failed with 1: second.log"
    assert first["third"] == "left out: no_such_module_or_program is not there"
    assert (state / "first-thing.log").read_text() == "seen\n"
    (tmp_path / "mended").touch()
    again = gpu.run_all(stages, state, say=said.append)
    assert again == {"second": "done", "third": first["third"]}
    assert set(gpu.run_all(stages, state, say=said.append)) == {"third"}
    assert len(said) == 3 + 2 + 1


def test_a_stage_ends_at_its_limit(tmp_path):
    slow = Stage("slow", python("import time; time.sleep(60)"))
    assert gpu.run_stage(slow, tmp_path, limit=0.5) == "out of time after 0.5 s"
    assert not gpu.done_file(slow, tmp_path).exists()
    assert gpu.LIMIT <= 480


def test_no_stage_starts_after_the_time_that_was_given(stages, tmp_path):
    outcomes = gpu.run_all(stages, tmp_path, minutes=-1.0, say=lambda line: None)
    assert set(outcomes.values()) == {"not started: run again to go on"}


def test_a_stage_gets_its_environment(tmp_path):
    program = "import os, sys; sys.exit(os.environ.get('WORD') != 'said')"
    stage = Stage("word", python(program), environment=(("WORD", "said"),))
    assert gpu.run_stage(stage, tmp_path) == "done"


def test_the_report_is_made_again_when_something_is_new(tmp_path):
    found = [Stage("case", python("pass")), Stage("report", python("pass"))]
    assert list(gpu.run_all(found, tmp_path, say=lambda line: None)) == ["case", "report"]
    assert gpu.run_all(found, tmp_path, say=lambda line: None) == {}
    gpu.done_file(found[0], tmp_path).unlink()
    assert list(gpu.run_all(found, tmp_path, say=lambda line: None)) == ["case", "report"]


def test_the_script_lists_its_stages():
    done = subprocess.run(
        ["bash", "bench/gpu.sh", "--list"], cwd=gpu.ROOT, capture_output=True, text=True,
        env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable}, check=True,
    )  # fmt: skip
    names = [line.rsplit(None, 2)[0] for line in done.stdout.splitlines()]
    assert names[0] == "build"
    assert names[-1] == "report"
    assert {"test ops/loss", "test executors/triton", "sanitizer memcheck"} <= set(names)
    on_gpu = [c.name for c in CASES.values() if c.device == "cuda"]
    assert [n.removeprefix("bench ") for n in names if n.startswith("bench ")] == on_gpu
    files = {gpu.done_file(s, gpu.STATE) for s in gpu.stages()}
    assert len(files) == len(gpu.stages()), "two stages share a file"


def test_the_whole_suite_is_among_the_stages():
    """Every test file is in exactly one stage."""
    tested = [w for s in gpu.stages() for w in s.command if w.startswith("tests")]
    for file in (gpu.ROOT / "tests").rglob("test_*.py"):
        path = str(file.relative_to(gpu.ROOT))
        assert sum(path == t or path.startswith(f"{t}/") for t in tested) == 1, path


@pytest.mark.parametrize(
    ("gpu_name", "name"),
    [("NVIDIA H200", "h200"), ("NVIDIA A100-SXM4-80GB", "a100-sxm4-80gb"), ("NVIDIA", "gpu"),
     ("AMD Instinct MI300X", "instinct-mi300x")],
)  # fmt: skip
def test_results_are_named_after_the_gpu(gpu_name, name):
    assert gpu.file_name(gpu_name) == name


def part(case):
    took = {"median": 2e-3, "low": 1e-3, "high": 3e-3, "samples": 4}
    seconds = dict.fromkeys(("forward", "backward", "both", "host", "graph"), took)
    contenders = [
        {"name": name, "kind": kind, "seconds": seconds, "peak_bytes": 8, "first_call_seconds": 1.0}
        for name, kind in (("copy", "floor"), ("msdkern triton", "msdkern"), ("naive", "naive"))
    ]
    return {
        "format": 1,
        "date": "2000-01-01",
        "machine": {"cpu": "c", "cores": 1, "simd": "s", "gpu": {"name": "NVIDIA H200"}},
        "software": {"msdkern": "0", "torch": "2", "python": "3", "isa": None, "commit": "abc"},
        "settings": {"threads": 1, "seconds": 4.0, "memory_kept": False, "load": [0.0, 1.0]},
        "cases": [{"case": case.to_json(), "bytes": 8, "contenders": contenders}],
    }


def test_parts_become_one_file_and_a_page(tmp_path, capsys):
    names = ["gpu_tiny", "gpu_wide_statistics"]
    for name in names:
        (tmp_path / f"{name}.json").write_text(json.dumps(part(CASES[name])))
    assert gpu.report(tmp_path, tmp_path, [*names, "gpu_wide"]) == 0
    whole = json.loads((tmp_path / "h200.json").read_text())
    assert [entry["case"]["name"] for entry in whole["cases"]] == names
    page = (tmp_path / "h200.md").read_text()
    assert "# Benchmark: NVIDIA H200" in page
    assert "| `gpu_tiny` | msdkern triton | 2.00 ms | 2.00 ms |" in page
    assert "caches cold, buffers rotating" in page
    table = capsys.readouterr().out
    assert "| `gpu_tiny` | 5, 8, 10 |" in table
    assert "| 100 |" in table
    assert gpu.report(tmp_path, tmp_path, []) == 1


# A device that only counts ---------------------------------------------------------------------


class Device:
    """Time passes when somebody launches; a graph remembers the launches of its capture."""

    def __init__(self):
        self.now, self.launches, self.graphs = 0.0, [], []
        self.capturing = None

    def launch(self, cost, of):
        (self.launches if self.capturing is None else self.capturing).append((cost, of))
        if self.capturing is None:
            self.now += cost

    def Event(self, enable_timing):
        event = SimpleNamespace(at=None)
        event.record = lambda: setattr(event, "at", self.now)
        event.elapsed_time = lambda other: 1e3 * (other.at - event.at)
        return event

    def CUDAGraph(self):
        graph = SimpleNamespace(kept=[])
        graph.replay = lambda: [self.launch(*item) for item in graph.kept]
        return graph

    @contextlib.contextmanager
    def graph(self, graph):
        self.capturing = graph.kept
        yield
        self.capturing = None

    @contextlib.contextmanager
    def stream(self, stream):
        yield

    def Stream(self):
        return SimpleNamespace(wait_stream=lambda other: None)

    current_stream = Stream

    def synchronize(self):
        assert self.capturing is None, "a graph cannot be captured past this"

    def get_device_properties(self, index):
        return SimpleNamespace(L2_cache_size=1 << 10)


@pytest.fixture
def pretended():
    return Device()


def small_problem():
    return Problem(Case("small", 2, 4, 8, pair="none"))


def contender(pretended, problem, cost=1e-3):
    def call():
        pretended.launch(cost, problem.logits[0].data_ptr())
        return sum(z.sum() for z in problem.logits)

    return Contender("ours", "msdkern", call, call)


def test_copies_do_not_fit_into_the_cache():
    assert device.copies_of(1, 50 << 20) == device.MOST_COPIES
    assert device.copies_of(50 << 20, 50 << 20) == 2
    assert device.copies_of(1 << 33, 50 << 20) == 1


def test_every_call_meets_another_copy_and_a_cold_cache(pretended, monkeypatch):
    problem = small_problem()
    device.prepare(problem, pretended)
    clock = device.DeviceClock(pretended, "cpu")
    assert clock.cold.numel() == device.CACHES << 10
    chilled = []
    monkeypatch.setattr(clock, "chill", lambda: chilled.append(len(pretended.launches)))
    found = timing._both_block(contender(pretended, problem), problem, clock, 5)
    assert found["both"] == pytest.approx([1e-3] * 4)
    addresses = [of for _, of in pretended.launches]
    assert len(set(addresses)) == min(5, problem.copies)
    assert chilled == [0, 1, 2, 3, 4], "before each call, and outside its stamps"


def test_a_graph_holds_one_call_per_copy(pretended):
    problem = small_problem()
    device.prepare(problem, pretended)
    times = device.graph_seconds(contender(pretended, problem), problem, pretended)
    assert times == pytest.approx([1e-3] * device.REPLAYS)
    replayed = [of for _, of in pretended.launches[3 : 3 + problem.copies]]
    assert len(set(replayed)) == problem.copies


def test_host_and_graph_are_added_and_a_refusal_is_kept(pretended):
    problem = small_problem()
    good, bad = contender(pretended, problem), contender(pretended, problem)
    bad.name = "theirs"
    call = bad.train

    def refuse():
        if pretended.capturing is not None:
            pretended.capturing = None
            raise RuntimeError("cannot be captured\nindeed")
        return call()

    bad.train = refuse
    times = {}
    device.measure_more([good, bad], problem, times, pretended)
    assert set(times["ours"]) == {"host", "graph"}
    assert set(times["theirs"]) == {"host"}
    assert bad.facts["no_graph"] == "RuntimeError: cannot be captured"
    assert all(t > 0 for t in times["ours"]["host"])


def test_copies_hold_the_same_numbers():
    problem = small_problem()
    problem.multiply(3)
    first = problem.logits
    for _ in range(3):
        problem.rotate()
        assert all(torch.equal(a, b) for a, b in zip(problem.logits, first, strict=True))
        assert problem.logits[0].requires_grad
    assert problem.logits is first

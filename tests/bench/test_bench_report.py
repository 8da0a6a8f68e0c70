# SPDX-License-Identifier: Apache-2.0
"""The report: losing cannot be hidden, results compare, README shows the committed file."""

import copy
import json
import socket
from pathlib import Path

import pytest

from bench import picture, report
from bench.cases import Case
from bench.losing import where_we_lose

ROOT = Path(report.__file__).resolve().parent.parent


def took(median):
    return {"median": median, "low": 0.9 * median, "high": 1.1 * median, "samples": 40}


def contender(name, kind, forward, both, peak=1000):
    phases = {"forward": forward, "both": both, "backward": both - forward}
    seconds = {phase: took(value) for phase, value in phases.items()}
    facts = {"first_call_seconds": 3.0, "compile_cached": False}
    return {"name": name, "kind": kind, **facts, "seconds": seconds, "peak_bytes": peak}


def entry(ours=0.002, peak=1000, case=None):
    case = case or Case("imagenet", 7, 256, 1000)
    return {
        "case": case.to_json(),
        "group": case.group,
        "bytes": 7168000,
        "contenders": [
            contender("copy", "floor", 0.0002, 0.0005),
            contender("msdkern cpu", "msdkern", ours / 2, ours, peak),
            contender("naive", "naive", 0.04, 0.06),
            contender("shared", "eager", 0.01, 0.03),
            contender("compiled gram", "compiled", 0.005, 0.008, 1500),
            contender("compiled stacked", "compiled", 0.006, 0.012, 1200),
        ],
    }


@pytest.fixture
def results():
    return {
        "format": 1,
        "date": "2026-01-02",
        "machine": {"cpu": "A CPU", "cores": 2, "simd": "AVX2", "gpu": None},
        "software": {
            "python": "3.11",
            "torch": "2.13",
            "msdkern": "0.1.0",
            "isa": "avx2",
            "commit": "abc",
        },
        "settings": {"threads": 2, "seconds": 1.0, "memory_kept": True, "load": [0.1, 1.9]},
        "cases": [entry(), entry(0.016, 9000, Case("wide", 4, 128, 32000))],
    }


def test_page_gives_ratios_and_share_of_the_copy(results):
    page = report.page(results)
    row = next(line for line in page.splitlines() if line.startswith("| `imagenet`"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[5:] == [
        "60.0 ms",
        "30.0 ms",
        "8.00 ms (gram)",
        "**2.00 ms**",
        "4.0x",
        "30.0x",
        "25",
    ]


def test_losing_is_listed_worst_first(results):
    results["cases"].append(entry(0.08, 1000, Case("tiny", 5, 8, 10)))
    lost = [line for line in where_we_lose(results).splitlines() if line.startswith("- Slower")]
    assert lost[0].startswith("- Slower than *compiled gram* in `tiny` backward")
    assert "- Slower than *compiled gram* in `wide` forward and backward: 2.00x its time." in lost
    assert not any("imagenet" in line for line in lost)


def test_memory_that_a_rival_does_not_need_is_listed(results):
    assert "More memory than *naive* in `wide`" in where_we_lose(results)
    assert "More memory than *naive* in `imagenet`" not in where_we_lose(results)


def test_nothing_lost_still_names_the_smallest_lead_and_the_farthest(results):
    results["cases"].pop()
    text = where_we_lose(results)
    assert "Slower nowhere in this run; the smallest lead is 3.00x" in text
    assert "Farthest from the copy: `imagenet` forward (20%)" in text


def test_a_lead_within_the_spread_is_named(results):
    results["cases"] = [entry(0.0079)]
    assert "Leads within the spread of this run: `imagenet` forward and backward" in (
        where_we_lose(results)
    )


def test_a_wrong_kernel_is_listed_and_has_no_time(results):
    ours = results["cases"][0]["contenders"][1]
    del ours["seconds"], ours["peak_bytes"]
    ours["left_out"] = "gradient is wrong"
    assert "Left out in `imagenet`: *msdkern cpu*: gradient is wrong." in where_we_lose(results)
    row = next(x for x in report.page(results).splitlines() if x.startswith("| `imagenet`"))
    assert "left out" in row


def test_every_page_and_readme_table_says_where_we_lose(results):
    said = where_we_lose(results)
    assert f"## Where we lose\n\n{said}" in report.page(results)
    assert f"**Where we lose**\n\n{said}" in report.readme_table(results)


def test_comparison_pairs_cases_and_shows_the_machine(results):
    later = copy.deepcopy(results)
    for kept in later["cases"]:
        kept["contenders"][1]["seconds"]["both"]["median"] *= 2
    later["cases"].append(entry(case=Case("new", 2, 3, 4)))
    found = {(c.case, c.phase, c.contender): c.ratio for c in report.changes(results, later)}
    assert found["imagenet", "both", "msdkern cpu"] == pytest.approx(2)
    assert found["imagenet", "both", "copy"] == pytest.approx(1)
    assert not any(case == "new" for case, _, _ in found)
    assert "| `wide` | both | msdkern cpu | 16.0 ms | 32.0 ms | 2.00 |" in (
        report.comparison(results, later)
    )


def test_comparison_of_strangers_says_so(results):
    other = {**results, "cases": [entry(case=Case("new", 2, 3, 4))]}
    assert report.comparison(results, other) == "The two results have no case in common."


def test_readme_is_replaced_between_its_markers(results):
    text = "before\n<!-- bench:cpu -->\nold\n<!-- /bench -->\nafter\n"
    new = report.in_readme(text, "cpu", results)
    assert new.startswith("before\n<!-- bench:cpu -->\n\n| K, N, C |")
    assert new.endswith("<!-- /bench -->\nafter\n")
    assert "old" not in new
    assert report.in_readme(new, "cpu", results) == new


@pytest.mark.parametrize("text", ["nothing", "<!-- bench:cpu --> no end", "<!-- /bench -->"])
def test_readme_without_markers_is_refused(results, text):
    with pytest.raises(ValueError, match="README must contain"):
        report.in_readme(text, "cpu", results)


def committed():
    return sorted((ROOT / "bench" / "results").glob("*.json"))


def test_readme_shows_the_committed_results():
    readme = ROOT / "README.md"
    text = readme.read_text() if readme.exists() else ""
    for path in committed():
        assert report.in_readme(text, path.stem, json.loads(path.read_text())) == text, path.name
    shown = {part.split(" -->")[0] for part in text.split("<!-- bench:")[1:]}
    with_table = {name for name in shown if text.partition(f"<!-- bench:{name} -->\n\n|")[1]}
    assert with_table <= {path.stem for path in committed()}


def test_committed_pages_are_the_rendering_of_their_results():
    for path in committed():
        results = json.loads(path.read_text())
        assert path.with_suffix(".md").read_text() == report.page(results), path.name
        assert socket.gethostname() not in json.dumps(results["machine"])


def test_files_are_written_and_read_back(results, tmp_path):
    paths = report.write(results, tmp_path / "out", "cpu")
    assert [path.name for path in paths] == ["cpu.json", "cpu.md", "cpu.png"]
    assert json.loads(paths[0].read_text()) == results
    assert paths[2].read_bytes().startswith(b"\x89PNG")
    readme = tmp_path / "README.md"
    readme.write_text("<!-- bench:cpu --><!-- /bench -->")
    assert report.main([str(paths[0]), "--readme", str(readme)]) == 0
    assert report.readme_table(results) in readme.read_text()


def test_picture_without_matplotlib_names_the_extra(results, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install msdkern\[bench\]"):
        picture.draw(results, tmp_path / "x.png")

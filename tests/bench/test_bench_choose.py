# SPDX-License-Identifier: Apache-2.0
"""From results to the table of executors, and measuring its rows, without a GPU."""

import json

import pytest

from bench import choose
from bench.cases import CASES, Case
from msdkern.executors import order
from msdkern.executors.order import ANY, Region

NAMED = Region("named", 8, ANY, "cuda", (2, 8, 10, "float32"), 4.0, 9.0)
JSD = Region("jsd", ANY, ANY, "triton", (2, 8, 12, "float32"), 40.0, 9.0)


@pytest.fixture(autouse=True)
def two_rows(monkeypatch):
    monkeypatch.setitem(order.REGIONS, "cuda", (NAMED, JSD))


def case_entry(case, cuda, triton):
    took = {"cuda": cuda, "triton": triton}
    contenders = [
        {
            "name": f"msdkern {name}",
            "kind": "msdkern",
            "seconds": {"both": {"median": t, "low": t, "high": t, "samples": 4}},
        }
        for name, t in took.items()
        if t is not None
    ]
    return {"case": case.to_json(), "contenders": contenders}


def row_entry(row, cuda, triton):
    seconds = {"cuda": cuda, "triton": triton}
    return {"name": choose._name(row), "kind": row.kind, "at": list(row.at), "seconds": seconds}


def results(cases=(), rows=()):
    return {"cases": list(cases), "order": list(rows)}


def test_results_that_agree(tmp_path, capsys):
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps(results(rows=[row_entry(NAMED, 1e-5, 2e-5)])))
    assert choose.main([str(file)]) == 0
    said = capsys.readouterr().out
    assert 'Region("named", 8, ANY, "cuda", (2, 8, 10, "float32"), 10.0, 20.0),' in said
    assert 'Region("jsd", ANY, ANY, "triton", (2, 8, 12, "float32"), 40.0, 9.0),' in said
    assert "jsd, any size: not measured with both executors; triton stays" in said
    assert said.endswith("1 of 2 rows were measured; 0 of these disagree.\n")


def test_results_that_contradict_the_table(tmp_path, capsys):
    file = tmp_path / "gpu.json"
    rows = [row_entry(NAMED, 4e-5, 1e-5), row_entry(JSD, 1e-5, 1e-5)]
    file.write_text(json.dumps(results(rows=rows)))
    assert choose.main([str(file)]) == 1
    said = capsys.readouterr().out
    assert 'Region("named", 8, ANY, "triton", (2, 8, 10, "float32"), 40.0, 10.0),' in said
    assert "named, up to 8 exits: the table has cuda, measured is triton (triton / cuda:" in said
    assert "jsd, any size: the table has triton, measured is cuda" in said


def test_cases_count_in_the_row_they_fall_into():
    seen = [
        case_entry(Case("a", 4, 8, 100), 1e-3, 4e-3),
        case_entry(Case("b", 4, 8, 1000), 1e-3, 0.5e-3),
        case_entry(Case("many", 12, 8, 1000), 1e-3, 0.1e-3),  # no row
        case_entry(Case("matrix", 4, 8, 1000, "teacher", teachers=1), 1e-3, 0.1e-3),  # no row
        case_entry(Case("softmax", 4, 8, 10, family="softmax"), 1e-3, 0.1e-3),
        case_entry(Case("alone", 4, 8, 10), 1e-3, None),
    ]
    named, jsd = choose.verdicts(results(seen))
    assert [s.name for s in named.seen] == ["a", "b"]
    assert named.first == "cuda"  # the geometric mean of 4 and 0.5
    assert (named.measured.cuda, jsd.seen) == (NAMED.cuda, [])
    seen[0] = case_entry(Case("a", 4, 8, 100), 1e-3, 1.5e-3)
    assert choose.verdicts(results(seen))[0].first == "triton"


def test_a_tie_leaves_the_first_where_it_is():
    (named, _) = choose.verdicts(results(rows=[row_entry(NAMED, 1e-5, 0.98e-5)]))
    assert named.first == "cuda"


def test_results_of_before_there_was_a_table():
    assert "0 of 2 rows were measured" in choose.text({"cases": []})


@pytest.mark.parametrize("kind", ["named", "matrix", "jsd"])
def test_a_row_is_measured_at_its_shape(kind):
    row = NAMED._replace(kind=kind)
    found = choose.measure_row(row, ("cpu", "eager"), "cpu", seconds=0.02)
    assert found["name"] == choose._name(row) == f"{kind} (2, 8, 10) float32"
    assert found["at"] == [2, 8, 10, "float32"]
    assert set(found["seconds"]) == {"cpu", "eager"}
    assert all(t > 0 for t in found["seconds"].values())


def test_measuring_needs_an_executor(tmp_path, monkeypatch):
    monkeypatch.setattr(choose.executors, "reason", lambda name: "gone")
    with pytest.raises(SystemExit, match="an executor for GPUs must be available"):
        choose.main(["--measure", str(tmp_path / "rows.json")])


def test_every_loss_case_of_a_gpu_falls_into_a_row(monkeypatch):
    monkeypatch.undo()
    cases = [c for c in CASES.values() if c.device == "cuda" and c.family == "loss"]
    seen = results([case_entry(c, 1e-3, 2e-3) for c in cases])
    found = choose.verdicts(seen)
    assert sum(len(v.seen) for v in found) == len(cases)

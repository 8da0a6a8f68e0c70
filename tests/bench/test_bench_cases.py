# SPDX-License-Identifier: Apache-2.0
"""The table of cases: unique, valid, and holding the shapes that the design names."""

import pytest
import torch

from bench import cases
from bench.baselines import BASELINES

EVERYTHING = (*cases._LOSS, *cases._READ, *cases._CUDA)


def test_names_are_unique():
    names = [case.name for case in EVERYTHING]
    assert len(names) == len(set(names)) == len(cases.CASES)


@pytest.mark.parametrize("case", cases.CASES.values(), ids=lambda case: case.name)
def test_case_is_valid(case):
    weights = case.weights()
    assert len(weights) == case.exits
    assert all(len(row) == case.exits + case.teachers for row in weights)
    assert all(weights[i][i] == 0 for i in range(case.exits))
    assert any(any(row) for row in weights) == (case.pair != "none")
    assert 1 <= case.exits <= 32
    assert case.temperature > 0
    assert case.formulations
    assert set(case.formulations) <= set(BASELINES[case.family].compiled)


def test_named_weights_are_those_of_the_library():
    from msdkern import pairs

    for name in ("mutual", "last"):
        case = cases.Case("x", 4, 2, 3, pair=name)
        torch.testing.assert_close(torch.tensor(case.weights()), getattr(pairs, name)(4))


def test_processor_cases_stay_small():
    elements = [c.exits * c.rows * c.classes for c in cases.select(device="cpu")]
    assert max(elements) <= 2**25


def test_headline_shapes_are_there_and_try_every_formulation():
    headline = {(5, 1024, 100), (7, 256, 1000), (4, 128, 32000)}
    found = {
        (c.exits, c.rows, c.classes)
        for c in cases.select()
        if c.pair == "mutual" and set(c.formulations) == set(BASELINES["loss"].compiled)
    }
    assert headline <= found


def test_select_takes_patterns_in_table_order():
    assert [case.name for case in cases.select(["tiny"])] == ["tiny"]
    names = [case.name for case in cases.select(["tiny*", "overhead"])]
    assert names == ["overhead", "tiny", "tiny_64", "tiny_statistics", "tiny_gate"]
    assert {c.device for c in cases.select(device="cuda")} == {"cuda"}
    assert all(c.quick for c in cases.select(quick=True))


def test_select_refuses_an_unknown_name():
    with pytest.raises(ValueError, match=r"case must be one of .*; got 'nothing'"):
        cases.select(["tiny", "nothing"])

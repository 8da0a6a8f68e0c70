# SPDX-License-Identifier: Apache-2.0
"""Bad input to gates and to the ops on rows: one sentence that names op, rule and value."""

import math

import pytest
import torch

import msdkern
from tests.servers import SERVERS, serve

N, C = 4, 5
Z, STAY, COUNT = torch.zeros(N, C), torch.arange(N), torch.tensor(2)
FLOAT, INT = torch.zeros(N), torch.zeros(N, dtype=torch.int64)


def step(**options):
    return lambda: msdkern.gate_step(**{"logits": Z, "threshold": 0.5, **options})


def gate(**options):
    return lambda: msdkern.exit_gate(**{"logits": [Z, Z], "threshold": 0.5, **options})


MEASURES = "confidence, margin, entropy, normalized_entropy, max_logit, patience, score"
GIVEN = "score must be given exactly when measure is 'score'; got "
BEFORE = "previous must be prediction int64 [4] and score [4] of the exit before; got "
PAIR = "exit_gate: threshold must be a number or 2 numbers, one per exit; got "
WRONG = {
    "gate_step: logits must be a tensor [N, C] of one exit; got float32 [4]": step(logits=FLOAT),
    "gate_step: logits must be a tensor [N, C] of one exit; got 2 x float32 [4, 5]": (
        step(logits=[Z, Z])
    ),
    "gate_step: logits must be float32, bfloat16, float16 or float64; got int64 [4, 5]": (
        step(logits=Z.long())
    ),
    f"gate_step: measure must be one of {MEASURES}; got 'variance'": step(measure="variance"),
    "gate_step: threshold must not be NaN; got nan": step(threshold=math.nan),
    "gate_step: threshold must be a number; got [0.5, 0.5]": None,
    "gate_step: threshold must be a number; got None": step(threshold=None),
    "gate_step: temperature must be positive and finite; got 0": step(temperature=0),
    "gate_step: temperature must be positive and finite; got inf": step(temperature=math.inf),
    "gate_step: " + GIVEN + "\"measure 'score' and score None\"": step(measure="score"),
    "gate_step: " + GIVEN + "\"measure 'margin' and score float32 [4]\"": (
        step(measure="margin", score=FLOAT)
    ),
    "gate_step: score must be floating point [4]; got int64 [4]": step(measure="score", score=INT),
    "gate_step: score must be floating point [4]; got float32 [3]": (
        step(measure="score", score=FLOAT[:3])
    ),
    "gate_step: previous must be None unless measure is 'patience'; got \"measure 'margin'\"": (
        step(measure="margin", previous=(INT, FLOAT))
    ),
    "gate_step: " + BEFORE + "2 x float32 [4]": (step(measure="patience", previous=(FLOAT, INT))),
    "gate_step: " + BEFORE + "2 x int64 [3]": (
        step(measure="patience", previous=(INT[:3], FLOAT[:3]))
    ),
    "gate_step: live must be a 0-d int64 tensor; got 3": step(live=3),
    "gate_step: live must be a 0-d int64 tensor; got float32 []": step(live=torch.tensor(3.0)),
    PAIR + "3 x 0.5": gate(threshold=[0.5] * 3),
    PAIR + "float32 [3]": gate(threshold=torch.zeros(3)),
    PAIR + "2 x '0.5'": gate(threshold=["0.5", "0.5"]),
    "exit_gate: threshold must not be NaN; got nan": gate(threshold=[0.5, math.nan]),
    "exit_gate: threshold must not require a gradient (detach it); got float32 [2]": (
        gate(threshold=torch.zeros(2, requires_grad=True))
    ),
    "exit_gate: temperature must be positive and finite; got -1.0": gate(temperature=[1.0, -1.0]),
    "exit_gate: score must be floating point [2, 4]; got float32 [4]": (
        gate(measure="score", score=FLOAT)
    ),
    "compact_rows: stay must be int64 [N]; got float32 [4]": (
        lambda: msdkern.compact_rows(Z, FLOAT, 2)
    ),
    "compact_rows: count must be between 0 and 4; got 5": lambda: msdkern.compact_rows(Z, STAY, 5),
    "compact_rows: count must be a number or a 0-d int64 tensor; got 2.0": (
        lambda: msdkern.compact_rows(Z, STAY, 2.0)
    ),
    "compact_rows: count must be a number or a 0-d int64 tensor; got int64 [4]": (
        lambda: msdkern.compact_rows(Z, STAY, STAY)
    ),
    "compact_rows: x must be a tensor or a sequence of tensors; got an empty sequence": (
        lambda: msdkern.compact_rows([], STAY, 2)
    ),
    "compact_rows: tensors of x must share their first axis and their device; "
    "got 'float32 [4, 5] and float32 [3]'": (lambda: msdkern.compact_rows([Z, FLOAT[:3]], STAY, 2)),
    "compact_rows: x must not require a gradient (use torch.no_grad()); got float32 [4, 5]": (
        lambda: msdkern.compact_rows(Z.clone().requires_grad_(), STAY, 2)
    ),
    "compact_rows: x must be dense; got 'torch.sparse_coo'": (
        lambda: msdkern.compact_rows(Z.to_sparse(), STAY, 2)
    ),
    "scatter_rows: values must have the dtype, device and row shape of out; "
    "got 'float32 [4] and int64 [4]'": lambda: msdkern.scatter_rows(FLOAT, INT, STAY),
    "scatter_rows: values must be 2 tensors; got 1": (
        lambda: msdkern.scatter_rows([FLOAT, FLOAT], [FLOAT], STAY)
    ),
    "scatter_rows: index must have at least 4 entries; got int64 [3]": (
        lambda: msdkern.scatter_rows(FLOAT, FLOAT, STAY[:3])
    ),
    "scatter_rows: count must be between 0 and 4; got -1": (
        lambda: msdkern.scatter_rows(FLOAT, FLOAT, STAY, -1)
    ),
}
WRONG = {sentence: call for sentence, call in WRONG.items() if call is not None}


@pytest.mark.parametrize("sentence", WRONG)
def test_one_sentence(sentence):
    with pytest.raises((ValueError, TypeError)) as caught:
        WRONG[sentence]()
    assert str(caught.value) == sentence


@pytest.mark.parametrize("server", SERVERS)
def test_values_held_in_tensors(server):
    nan, zero = torch.tensor(math.nan), torch.tensor(0.0)
    wrong = {
        "gate_step: threshold must not be NaN; got nan": step(threshold=nan),
        "gate_step: temperature must be positive and finite; got 0.0": step(temperature=zero),
        "exit_gate: threshold must not be NaN; got [0.5, nan]": (
            gate(threshold=torch.tensor([0.5, math.nan]))
        ),
        "exit_gate: temperature must be positive and finite; got [1.0, 0.0]": (
            gate(temperature=torch.tensor([1.0, 0.0]))
        ),
    }
    with serve(server):
        for sentence, call in wrong.items():
            with pytest.raises(ValueError) as caught:  # noqa: PT011
                call()
            assert str(caught.value) == sentence

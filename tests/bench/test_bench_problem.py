# SPDX-License-Identifier: Apache-2.0
"""Every contender is held against the float64 truth, and the truth against autograd."""

import functools

import pytest
import torch

from bench import floor, memory, peers
from bench.baselines import BASELINES, pairwise, softmax_per_exit
from bench.cases import Case
from bench.contenders import Contender, contenders, prepare
from bench.problem import Problem, WrongResult

PAIRS = ("mutual", "last", "dense", "none", "teacher")


def case(**options):
    options = {"exits": 4, "rows": 6, "classes": 7, "temperature": 2.5} | options
    options["teachers"] = int(options.get("pair") == "teacher")
    return Case("small", formulations=(), **options)


def arguments(problem):
    return problem.recipe, problem.logits, problem.target, problem.teachers


@pytest.mark.parametrize("pair", PAIRS)
def test_truth_is_what_autograd_says_in_float64(pair):
    problem = Problem(case(pair=pair))
    z = [x.detach().double().requires_grad_() for x in problem.logits]
    teachers = [x.double() for x in problem.teachers]
    loss = torch.zeros((), dtype=torch.float64)
    log_q = [torch.log_softmax(x / 2.5, 1) for x in (*z, *teachers)]
    for i, x in enumerate(z):
        loss = loss + torch.nn.functional.cross_entropy(x, problem.target)
        for weight, teacher in zip(problem.recipe.weights[i], log_q, strict=True):
            q = teacher.detach().exp()
            loss = loss + 2.5**2 * weight * (q * (teacher.detach() - log_q[i])).sum(1).mean()
    torch.testing.assert_close(problem.truth.outputs[0], loss.detach(), rtol=1e-12, atol=0)
    for found, expected in zip(problem.truth.gradients, torch.autograd.grad(loss, z), strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-9)


def test_truth_is_the_same_in_blocks_of_rows(monkeypatch):
    whole = Problem(case()).truth
    monkeypatch.setattr("bench.problem._TRUTH_ROWS", 4 * 7 * 4)
    blocks = Problem(case()).truth
    torch.testing.assert_close(blocks.outputs, whole.outputs, rtol=1e-14, atol=0)
    torch.testing.assert_close(blocks.gradients, whole.gradients, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("name", BASELINES["loss"].compiled)
def test_loss_formulations_are_correct(name, pair, dtype):
    problem = Problem(case(pair=pair, dtype=dtype))
    errors = problem.check(BASELINES["loss"].compiled[name](*arguments(problem)))
    assert set(errors) == {"value", "gradient"}


@pytest.mark.parametrize("family", ["softmax", "statistics", "gate"])
@pytest.mark.parametrize("which", ["naive", "shared"])
def test_other_families_are_correct(family, which):
    problem = Problem(case(family=family, exits=1 if family == "gate" else 4))
    problem.check(getattr(BASELINES[family], which)(*arguments(problem)))


@pytest.mark.parametrize("name", BASELINES["gate"].compiled)
def test_gate_formulations_are_correct(name):
    problem = Problem(case(family="gate", exits=1, rows=50))
    outputs = list(BASELINES["gate"].compiled[name](*arguments(problem)))
    assert problem.check(outputs)["value"] < 1e-5
    outputs[2] = outputs[2].flip(0)
    with pytest.raises(WrongResult, match="value is wrong"):
        problem.check(outputs)


@pytest.mark.parametrize("family", ["loss", "softmax", "statistics", "gate"])
def test_library_is_correct_in_every_family(family):
    problem = Problem(case(family=family, exits=1 if family == "gate" else 4))
    (ours,) = [c for c in contenders(problem, ["eager"]) if c.kind == "msdkern"]
    prepare(ours, problem)
    assert ours.left_out is None
    assert ours.facts["errors"]


@pytest.mark.parametrize("pair", PAIRS)
def test_library_is_asked_for_the_same_loss(pair):
    problem = Problem(case(pair=pair))
    (ours,) = [c for c in contenders(problem, ["eager"]) if c.kind == "msdkern"]
    problem.check(ours.train())


def test_compiled_contender_is_correct():
    problem = Problem(Case("small", 2, 4, 5, formulations=("stacked",)))
    (compiled,) = [c for c in contenders(problem, ["eager"]) if c.kind == "compiled"]
    prepare(compiled, problem)
    assert compiled.left_out is None
    assert compiled.facts["first_call_seconds"] > 0
    assert "compile_cached" in compiled.facts


def scaled_gradient(problem):
    loss = pairwise(*arguments(problem))
    return loss + 0.01 * (loss - loss.detach())


def scaled_value(problem):
    return pairwise(*arguments(problem)) + 0.01


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [(scaled_gradient, "gradient is wrong"), (scaled_value, "value is wrong")],
)
def test_a_wrong_contender_is_left_out(wrong, sentence):
    problem = Problem(case())
    call = functools.partial(wrong, problem)
    contender = Contender("wrong", "eager", call, call)
    prepare(contender, problem)
    assert sentence in contender.left_out


def test_a_prediction_that_is_not_the_largest_logit_is_wrong():
    problem = Problem(case(family="statistics"))
    outputs = list(BASELINES["statistics"].naive(*arguments(problem)))
    outputs[2] = (outputs[2] + 1) % 7
    with pytest.raises(WrongResult, match="value is wrong"):
        problem.check(outputs)


def test_a_missing_output_is_wrong():
    problem = Problem(case(family="softmax"))
    with pytest.raises(WrongResult, match="must be 4; got 2"):
        problem.check(softmax_per_exit(*arguments(problem))[:2])


def test_a_contender_that_raises_is_left_out_with_its_reason():
    def refuse():
        raise RuntimeError("no such kernel\nand more")

    contender = Contender("broken", "msdkern", refuse, refuse)
    prepare(contender, Problem(case()))
    assert contender.left_out == "RuntimeError: no such kernel"


def test_floor_hands_out_gradients_of_the_size_of_the_logits():
    problem = Problem(case())
    for found, z in zip(problem.gradients(floor.train(problem)), problem.logits, strict=True):
        torch.testing.assert_close(found, z.detach(), rtol=0, atol=0)
        assert found.data_ptr() != z.data_ptr()
    outputs = floor.train(Problem(case(family="softmax")))
    assert [y.shape for y in outputs] == [(6, 7)] * 4


def test_peak_memory_counts_what_lives_at_once():
    problem = Problem(case(family="statistics"))

    def call():
        first = torch.empty(1000, dtype=torch.uint8)
        del first
        return torch.empty(3000, dtype=torch.uint8), torch.empty(500, dtype=torch.uint8)

    assert memory.peak_bytes(Contender("x", "eager", call, call), problem) == 3500


def test_a_peer_that_cannot_be_imported_is_not_there(monkeypatch):
    def missing(problem):
        raise ImportError("no such project")

    here = lambda problem: lambda: problem.logits[0].sum()  # noqa: E731
    monkeypatch.setattr(peers, "PEERS", {"missing": missing, "here": here})
    assert [name for name, _ in peers.available(Problem(case()))] == ["here"]
    assert not list(peers.available(Problem(case(family="statistics"))))


def test_a_peer_that_overwrites_its_logits_gets_a_copy():
    def overwriting(z, target):
        loss = torch.nn.functional.cross_entropy(z.float(), target)
        with torch.no_grad():
            z.mul_(0)
        return loss

    def divergence(student, teacher):
        return torch.nn.functional.kl_div(student, teacher, reduction="batchmean", log_target=True)

    problem = Problem(case())
    before = [z.detach().clone() for z in problem.logits]
    value = peers._pairs(problem, overwriting, divergence)
    torch.testing.assert_close(value.detach().double(), problem.truth.outputs[0], rtol=1e-5, atol=0)
    torch.testing.assert_close([z.detach() for z in problem.logits], before, rtol=0, atol=0)

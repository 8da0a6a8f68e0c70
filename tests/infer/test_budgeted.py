# SPDX-License-Identifier: Apache-2.0
"""Leaving early answers what running everything and choosing afterwards answers."""

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

import msdkern
from msdkern import infer, models, reference
from msdkern.calibrate import Thresholds
from tests.cases import generator, property_test
from tests.infer.networks import Table, tables
from tests.servers import SERVERS, serve

THRESHOLDS = (-torch.inf, torch.inf, 0.0, 0.25, 0.5, 0.9, 1.0, "tie")
limits = st.one_of(st.sampled_from(THRESHOLDS), st.floats(-1.0, 4.0, width=32))


@hypothesis.given(
    st.integers(1, 5), st.integers(0, 40), st.sampled_from((1, 2, 10)),
    st.sampled_from(reference.MEASURES), st.lists(limits, min_size=5, max_size=5),
    st.sampled_from((1, 3, 40)), st.booleans(), st.booleans(), st.integers(0, 999),
)  # fmt: skip
@hypothesis.settings(property_test, max_examples=120)
def test_early_answers_are_those_chosen_afterwards(
    exits, rows, classes, measure, thresholds, batch, nested, broken, seed
):
    z = tables(exits, rows, classes, seed)
    if broken and rows:
        z[seed % exits, seed % rows] = torch.nan
    t = [0.5 + 0.5 * k for k in range(exits)]
    given = torch.rand(exits, rows, generator=generator(seed)) if measure == "score" else None
    limits = [number(limit, z, k, measure, t, given) for k, limit in enumerate(thresholds[:exits])]
    score = None if given is None else lambda k, features, logits: given[k][index_of(features)]
    order = torch.randperm(rows, generator=generator(seed))
    model = Table(z, nested)
    for server in SERVERS[:2]:
        with serve(server):
            expected = msdkern.exit_gate(z, limits, measure, temperature=t, score=given)
            runner = infer.AdaptiveRunner(model, limits, measure, temperature=t, score=score)
            found = runner.run(order.split(batch) if rows else [order])
            streamed = infer.AdaptiveRunner(model, limits, measure, temperature=t, score=score)
            answers = sorted(infer.Stream(streamed, batch).answer(order.split(7)))
        for ours, true in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, true[order], rtol=0, atol=0, equal_nan=True)
        left = torch.bincount(expected.exit_index, minlength=exits).tolist()
        assert runner.report.left == left
        assert runner.report.entered == [sum(left[k:]) for k in range(exits)]
        assert [a.ticket for a in answers] == list(range(rows))
        for n, a in enumerate(answers):
            true = tuple(column[order[n]].item() for column in expected)
            assert a[1:3] == true[:2]
            assert a.score == true[2] or (a.score != a.score and true[2] != true[2])
        assert streamed.report.left == left


def number(limit, z, k, measure, t, given):
    """A threshold; "tie" is the score that one of the rows has at exit k."""
    if limit != "tie":
        return limit
    scores, _ = msdkern.calibrate.exit_scores(z, measure, temperature=t, score=given)
    known = scores[k][~scores[k].isnan()]
    return float(known[len(known) // 2]) if len(known) else 0.5


def index_of(features):
    return features["rows"][0] if isinstance(features, dict) else features


def test_stages_see_only_the_rows_that_stayed():
    z = torch.zeros(3, 8, 2)
    z[0, :4, 0] = z[1, :6, 0] = 9.0
    model = Table(z)
    runner = infer.AdaptiveRunner(model, 0.9, madds=[10, 20, 40])
    found = runner(torch.arange(8))
    assert model.seen == [[8], [4], [2]]
    assert found.exit_index.tolist() == [0] * 4 + [1] * 2 + [2] * 2
    assert runner.report.share == [0.5, 0.25, 0.25]
    assert runner.report.mean_madds == 20
    record = runner.report.to_dict()
    assert record["exits"][1]["entered"] == 4
    assert record["seconds"] >= sum(e["stage_seconds"] for e in record["exits"]) > 0
    runner.report.clear()
    assert runner.report.rows == 0
    infer.AdaptiveRunner(model, -torch.inf)(torch.arange(8))
    assert model.seen == [[8, 8], [4], [2]]  # nobody went on


@pytest.mark.parametrize("measure", [m for m in reference.MEASURES if m != "score"])
@pytest.mark.parametrize("rows", [1, 6])
def test_all_leave_at_one_exit(measure, rows):
    """Nobody before it, so nothing is copied; everybody there, so no later stage runs."""
    z = tables(4, rows, 3, 5)
    never, always = (1e9, -1e9) if measure not in reference.LOW_SCORES else (-1e9, 1e9)
    for exit_index in range(4):
        model = Table(z)
        limits = [never] * exit_index + [always] * (4 - exit_index)
        given = []
        for stage in model.stages:
            stage.register_forward_pre_hook(lambda _, inputs, given=given: given.append(inputs[0]))
        x = torch.arange(rows)
        found = infer.AdaptiveRunner(model, limits, measure)(x)
        assert found.exit_index.tolist() == [exit_index] * rows
        assert torch.equal(found.prediction, z[exit_index].argmax(-1))
        assert model.seen == [[rows]] * (exit_index + 1) + [[]] * (3 - exit_index)
        assert all(features is x for features in given)


def test_an_empty_batch():
    runner = infer.AdaptiveRunner(Table(tables(2, 3, 4, 0)), 0.5)
    found = runner(torch.arange(0))
    assert [x.shape for x in found] == [(0,)] * 3
    assert [x.dtype for x in found] == [torch.int64, torch.int64, torch.float32]
    assert runner.report.rows == 0
    for batch in (1, 4):
        assert list(infer.Stream(runner, batch).answer([torch.arange(0)] * 2)) == []


def test_a_real_network_from_one_row_to_many():
    """Convolutions may round by batch size, so rows beside a threshold are left out."""
    torch.manual_seed(0)
    model = models.create("resnet8", 10, 3, width=8).eval()
    with torch.no_grad():
        for stage in model.stages:
            stage.exit.classifier.weight.mul_(20)
    x = torch.randn(60, 3, 16, 16, generator=generator(1)).to(memory_format=torch.channels_last)
    with torch.no_grad():
        z = model(x)
    for measure in ("confidence", "entropy", "max_logit"):
        scores, _ = msdkern.calibrate.exit_scores(z, measure)
        limit = float(scores[0].median())
        expected = msdkern.exit_gate(z, limit, measure)
        safe = ((scores - limit).abs() > 1e-4).all(0)
        assert safe.sum() > 50
        model.train()
        for size in (1, 7, 60):
            runner = infer.AdaptiveRunner(model, limit, measure)
            found = runner.run(x.split(size))
            assert torch.equal(found.exit_index[safe], expected.exit_index[safe])
            assert torch.equal(found.prediction[safe], expected.prediction[safe])
            assert 0 < runner.report.left[0] < 60
        assert model.training  # the mode is given back
        assert all(module.training for module in model.modules())
        model.eval()


class Mode(torch.nn.Module):
    """Answers by the mode that the module inside it is in."""

    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Identity()

    def forward(self, features, logits):
        return features, [*logits, torch.full((len(features), 2), float(self.inner.training))]


def test_every_call_runs_in_evaluation_mode_and_gives_the_mode_back():
    model = staged(Mode(), Mode())
    runner = infer.AdaptiveRunner(model, torch.inf, "max_logit")
    anytime = infer.AnytimeRunner(model)
    inner = model.stages[1].inner

    def check():
        modes = [module.training for module in model.modules()]
        assert runner(torch.zeros(2)).score.tolist() == [0.0, 0.0]
        assert anytime(torch.zeros(2), torch.inf).logits.sum() == 0
        assert [module.training for module in model.modules()] == modes

    for switch in (model.train, model.eval, model.train, inner.eval, model.eval, model.eval):
        switch()
        check()
    inner.train()  # alone, after all were seen in evaluation mode: its caller's wish
    assert runner(torch.zeros(2)).score.tolist() == [1.0, 1.0]
    for stage in model.stages:
        stage.train()
        check()
    fresh = staged(Mode(), Mode()).eval()
    fresh.stages[1].inner.train()  # before: seen
    assert infer.AdaptiveRunner(fresh, torch.inf, "max_logit")(torch.zeros(1)).score == 0


def test_thresholds_from_a_file():
    z = tables(3, 20, 5, 3)
    found = Thresholds("entropy", (0.9, 1.1, -1e8), (1.0, 2.0, 0.5), "model", "data")
    ours = infer.AdaptiveRunner(Table(z), found)(torch.arange(20))
    expected = msdkern.exit_gate(z, [0.9, 1.1, 0.0], "entropy", temperature=[1.0, 2.0, 0.5])
    for a, b in zip(ours, expected, strict=True):
        assert torch.equal(a, b)


class TooFew(torch.nn.Module):
    def forward(self, features, logits):
        return features, [*logits, features[1:]]


class OneTooMany(torch.nn.Module):
    def forward(self, features, logits):
        return features, [*logits, features, features]


def staged(*stages):
    model = torch.nn.Module()
    model.stages = torch.nn.ModuleList(stages)
    return model


MODEL = Table(tables(2, 3, 4, 0))
WRONG = {
    "AdaptiveRunner: the model must have stages; got 'Linear'": lambda: infer.AdaptiveRunner(
        torch.nn.Linear(2, 2), 0.5
    ),
    "AdaptiveRunner: thresholds must be one number or 2, one per exit; got 3 x 0.5": lambda: (
        infer.AdaptiveRunner(MODEL, [0.5] * 3)
    ),
    "AdaptiveRunner: thresholds must not be NaN; got nan": lambda: infer.AdaptiveRunner(
        MODEL, float("nan")
    ),
    "AdaptiveRunner: temperature must be positive and finite; got 0.0": lambda: (
        infer.AdaptiveRunner(MODEL, 0.5, temperature=0.0)
    ),
    "AdaptiveRunner: score must be given exactly when measure is 'score'; got 'score'": lambda: (
        infer.AdaptiveRunner(MODEL, 0.5, "score")
    ),
    "AdaptiveRunner: x must be tensors that share their first axis, the rows; got '[]'": lambda: (
        infer.AdaptiveRunner(MODEL, 0.5)([1, 2])
    ),
    "AdaptiveRunner: stage 1 must return (features, logits + [new]) with 1 logits; got 2": lambda: (
        infer.AdaptiveRunner(staged(OneTooMany()), 0.5)(torch.zeros(2, 3))
    ),
    "AdaptiveRunner: stage 1 must answer the 2 rows that it gets; got float32 [1, 3]": lambda: (
        infer.AdaptiveRunner(staged(TooFew()), 0.5)(torch.zeros(2, 3))
    ),
    "Stream: stage 1 must answer the 2 rows that it gets; got float32 [1, 3]": lambda: list(
        infer.Stream(infer.AdaptiveRunner(staged(TooFew()), 0.5), 2).answer([torch.zeros(2, 3)])
    ),
    "AdaptiveRunner: there must be at least one batch; got none": lambda: infer.AdaptiveRunner(
        MODEL, 0.5
    ).run([]),
    "Stream: batch_size must be at least 1; got 0": lambda: infer.Stream(
        infer.AdaptiveRunner(MODEL, 0.5), 0
    ),
    "Stream: max_wait must not be negative; got -1": lambda: infer.Stream(
        infer.AdaptiveRunner(MODEL, 0.5), 1, -1
    ),
    "AnytimeRunner: seconds must be a number; got nan": lambda: infer.AnytimeRunner(MODEL)(
        torch.arange(2), float("nan")
    ),
    "AnytimeRunner: margin must be positive; got 0": lambda: infer.AnytimeRunner(MODEL, 0),
}


@pytest.mark.parametrize("sentence", WRONG)
def test_bad_input_is_one_sentence(sentence):
    with pytest.raises((ValueError, TypeError)) as caught:
        WRONG[sentence]()
    assert str(caught.value) == sentence

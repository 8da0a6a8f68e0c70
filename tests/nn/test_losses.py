# SPDX-License-Identifier: Apache-2.0
"""`MSDLoss` against equation (8) written out, with every option; and how a criterion behaves."""

import math

import pytest
import torch
from torch.nn import functional as F

import msdkern

EXITS, ROWS, CLASSES, WIDTH = 4, 6, 5, 3


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)

    def random(width):
        x = torch.randn(ROWS, width, generator=generator, dtype=torch.float64)
        return x.requires_grad_()

    logits = [random(CLASSES) for _ in range(EXITS)]
    features = [random(WIDTH) for _ in range(EXITS)]
    return logits, torch.tensor([3, 1, 0, 4, -100, 0]), features


DEFAULTS = {
    "alpha": 0.25,
    "temperature": 2.0,
    "beta_begin": 0.5,
    "beta_end": 0.125,
    "temperature_squared": True,
    "detach_teacher": True,
    "divergence": "forward_kl",
    "feature_reduction": "mean",
    "detach_features": True,
    "exit_weight": None,
}


def equation_8(z, y, f, progress=0.0, **options):
    """The whole of equation (8) by double loops; rows are those that count."""
    o = {**DEFAULTS, **options}
    exits, t = len(z), o["temperature"]
    held = [x.detach() for x in z] if o["detach_teacher"] else z
    total = 0.0
    for k in range(exits):
        weight = 1.0 if o["exit_weight"] is None else o["exit_weight"][k]
        total = total + (1 - o["alpha"]) * weight * F.cross_entropy(z[k], y)
    scale = o["alpha"] / (exits - 1) * (t * t if o["temperature_squared"] else 1.0)
    for i in range(exits):
        for j in range(exits):
            if i != j:
                log_s, log_t = (torch.log_softmax(x / t, 1) for x in (z[i], held[j]))
                a, b = (log_t, log_s) if o["divergence"] == "forward_kl" else (log_s, log_t)
                total = total + scale * (a.exp() * (a - b)).sum(1).mean()
    cosine = (1 + math.cos(math.pi * progress)) / 2
    beta = o["beta_end"] + (o["beta_begin"] - o["beta_end"]) * cosine
    deepest = f[-1].detach() if o["detach_features"] else f[-1]
    for k in range(exits - 1):
        squares = ((f[k] - deepest) ** 2).sum(1)
        total = total + beta * (
            squares.mean() if o["feature_reduction"] == "mean" else squares.sum()
        )
    return total


def same(loss, expected, leaves):
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    found = torch.autograd.grad(loss, leaves)
    wanted = torch.autograd.grad(expected, leaves, materialize_grads=True)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("progress", [0.0, 0.25, 1.0])
@pytest.mark.parametrize(
    "option",
    [
        {},
        {"temperature_squared": False},
        {"detach_teacher": False},
        {"divergence": "reverse_kl"},
        {"divergence": "reverse_kl", "detach_teacher": False},
        {"feature_reduction": "sum"},
        {"detach_features": False},
        {"exit_weight": [1.0, 0.5, 0.25, 2.0]},
        {"alpha": 0.0},
        {"alpha": 1.0},
        {"beta_begin": 0.0},
    ],
    ids=str,
)
def test_msd_is_equation_8(batch, option, progress):
    logits, target, features = batch
    criterion = msdkern.nn.MSDLoss(**{**DEFAULTS, **option})
    criterion.set_progress(progress)
    loss = criterion(logits, target, features)
    valid = target != -100
    z, f = [x[valid] for x in logits], [x[valid] for x in features]
    expected = equation_8(z, target[valid], f, progress, **option)
    same(loss, expected, [*logits, *features])


def test_label_options_are_those_of_cross_entropy(batch):
    logits, target, _ = batch
    options = {
        "class_weight": torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0]),
        "label_smoothing": 0.25,
        "ignore_index": 0,
    }
    target = target.clamp(min=0)
    criterion = msdkern.nn.MSDLoss(alpha=0.0, **options)
    options["weight"] = options.pop("class_weight").double()
    expected = sum(F.cross_entropy(z, target, **options) for z in logits)
    same(criterion(logits, target), expected, logits)


def test_soft_labels(batch):
    logits, _, features = batch
    target = torch.softmax(torch.randn(ROWS, CLASSES, dtype=torch.float64), 1)
    criterion = msdkern.nn.MSDLoss(**DEFAULTS)
    loss = criterion(logits, target, features)
    same(loss, equation_8(logits, target, features), [*logits, *features])


def test_reduction_and_normalizer(batch):
    logits, target, features = batch
    valid = int((target != -100).sum())
    settings = {**DEFAULTS, "beta_begin": 0.0, "beta_end": 0.0}
    mean = msdkern.nn.MSDLoss(**settings)(logits, target)
    total = msdkern.nn.MSDLoss(**settings, reduction="sum")(logits, target)
    torch.testing.assert_close(total, mean * valid)
    # Two halves, each divided by the count of the whole, add up to the whole: features too.
    criterion = msdkern.nn.MSDLoss(**DEFAULTS)
    halves = sum(
        criterion(
            [z[rows] for z in logits],
            target[rows],
            [f[rows] for f in features],
            normalizer=normalizer,
        )
        for rows, normalizer in ((slice(0, 2), valid), (slice(2, None), torch.tensor(valid)))
    )
    torch.testing.assert_close(halves, criterion(logits, target, features))


def test_stacked_logits_and_weights_per_call(batch):
    logits, target, _ = batch
    criterion = msdkern.nn.MultiExitLoss(exit_weight=[1.0, 1.0, 1.0, 1.0])
    weight = torch.rand(EXITS, ROWS, dtype=torch.float64)
    loss = criterion(torch.stack(logits), target, exit_weight=weight)
    rows = torch.stack([F.cross_entropy(z, target, reduction="none") for z in logits])
    same(loss, (weight * rows).sum() / (target != -100).sum(), logits)


def test_one_exit(batch):
    logits, target, features = batch
    criterion = msdkern.nn.MSDLoss(**DEFAULTS)
    loss = criterion(logits[:1], target, features[:1])
    expected = 0.75 * F.cross_entropy(logits[0], target) + 0 * features[0].sum()
    same(loss, expected, [logits[0], features[0]])


def test_terms_are_detached_parts_of_the_loss(batch):
    logits, target, features = batch
    criterion = msdkern.nn.MSDLoss(**DEFAULTS)
    loss = criterion(logits, target, features)
    terms = criterion.terms
    assert not any(term.requires_grad for term in terms.values())
    labels = torch.stack([F.cross_entropy(z, target) for z in logits])
    torch.testing.assert_close(terms["cross_entropy"], labels)
    whole = 0.75 * terms["cross_entropy"].sum() + terms["divergence"].sum()
    torch.testing.assert_close(terms["loss"], loss.detach())
    torch.testing.assert_close(whole + 0.5 * terms["feature"], loss.detach())


def test_zero_weights_give_zero_gradients(batch):
    logits, target, features = batch
    criterion = msdkern.nn.MSDLoss(0.0, 1.0, 1.0, 0.0, exit_weight=[0.0, 0.0, 0.0, 1.0])
    criterion.set_progress(1.0)
    assert criterion.needs_features
    criterion(logits, target, features).backward()
    assert logits[-1].grad.any()
    for leaf in [*logits[:-1], *features]:
        assert leaf.grad is not None
        assert not leaf.grad.any()


def test_temperature_may_be_assigned(batch):
    logits, target, _ = batch
    criterion = msdkern.nn.MSDLoss(0.25, 1.0)
    shared = torch.tensor(1.0)
    other = msdkern.nn.MSDLoss(0.25, shared)
    expected = msdkern.nn.MSDLoss(0.25, 4.0)(logits, target)
    criterion.temperature = 4.0
    shared.fill_(4.0)
    torch.testing.assert_close(criterion(logits, target), expected)
    torch.testing.assert_close(other(logits, target), expected)
    criterion.temperature = torch.tensor(1.0)
    assert criterion(logits, target) < expected
    with pytest.raises(ValueError, match=r"temperature must be positive and finite; got 0\.0"):
        criterion.temperature = 0.0


def test_the_temperature_is_saved_and_nothing_else():
    criterion = msdkern.nn.create("phuong_lampert", 3)
    criterion.temperature = 2.5
    state = criterion.state_dict()
    assert [float(x) for x in state.values()] == [2.5]
    fresh = msdkern.nn.create("phuong_lampert", 3)
    fresh.load_state_dict(state)
    assert fresh.temperature == 2.5


def test_schedules_and_temperature_recompile_nothing(batch):
    logits, target, features = batch
    criterion = msdkern.nn.MSDLoss(**DEFAULTS)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(criterion, backend=backend, fullgraph=True)
    for progress, temperature in ((0.0, 2.0), (0.25, 3.0), (1.0, 5.0)):
        criterion.set_progress(progress)
        criterion.temperature = temperature
        loss = compiled(logits, target, features)
        torch.testing.assert_close(loss, criterion(logits, target, features))
        assert criterion.terms["feature"] > 0
    assert len(graphs) == 1


def test_adaptive_temperature_compiles(batch):
    logits, target, _ = batch
    eager, compiled = (msdkern.nn.create("phuong_lampert", EXITS, bound=0.1) for _ in range(2))
    step = torch.compile(compiled, backend="eager", fullgraph=True)
    for _ in range(3):
        torch.testing.assert_close(step(logits, target), eager(logits, target))
    torch.testing.assert_close(compiled.temperature, torch.tensor(1.05**3))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda n: n.MSDLoss(alpha=1.5), r"MSDLoss: alpha must be between 0 and 1; got 1\.5"),
        (lambda n: n.MSDLoss(beta_begin=-1.0), r"beta_begin must not be negative; got -1\.0"),
        (lambda n: n.MSDLoss(temperature=-1.0), r"temperature must be positive .*; got -1\.0"),
        (lambda n: n.MSDLoss(feature_reduction="x"), "feature_reduction must be one of .* 'x'"),
        (lambda n: n.MultiExitLoss(pair_mean="x"), "pair_mean must be one of .* 'x'"),
        (lambda n: n.MultiExitLoss(teacher="x"), "teacher must be one of .* 'x'"),
        (lambda n: n.MSDLoss().set_progress(1.5), r"progress must be between 0 and 1; got 1\.5"),
        (lambda n: n.MSDLoss(beta_end=1.0)([torch.zeros(1, 2)], None), "features are needed"),
        (lambda n: n.MSDLoss(divergence="x")([torch.zeros(1, 2)], None), "divergence must be one"),
    ],
)
def test_errors_name_the_rule_and_the_value(make, words):
    with pytest.raises(ValueError, match=words):
        make(msdkern.nn)


def test_what_a_model_returns_as_a_dict_is_named():
    with pytest.raises(TypeError, match=r"MSDLoss: logits must be a sequence .* with logits, past"):
        msdkern.nn.MSDLoss()({"logits": torch.zeros(2, 3), "past": None}, None)

# SPDX-License-Identifier: Apache-2.0
"""msdkern/reference.py against PyTorch's own functions, formulas by hand and finite differences."""

import itertools
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Categorical, kl_divergence

from msdkern import reference
from tests.cases import DIVERGENCES, generator, make_logits

N, C = 7, 6


def logits(count=3, kind="random", rows=N):
    return make_logits(kind, (count, rows, C), torch.float64, 11)


def pair(kind="random", t=1.0):
    """log q of a student and a teacher."""
    student, teacher = logits(2, kind)
    return reference.log_softmax(student, t), reference.log_softmax(teacher, t)


@pytest.mark.parametrize("equation", range(1, 9))
def test_every_equation_is_cited(equation):
    source = Path(reference.__file__).read_text()
    head, _, body = source.partition("from __future__")
    assert f"({equation}) " in head
    assert f"({equation})" in body


def test_accumulation_dtypes():
    wide = {torch.float64: torch.float64, torch.float32: torch.float32}
    narrow = {torch.float16: torch.float32, torch.bfloat16: torch.float32}
    for dtype, expected in (wide | narrow).items():
        assert reference.accumulation_dtype(dtype) == expected
        assert reference.log_softmax(torch.zeros(1, 2, dtype=dtype)).dtype == expected


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", ["index", "probabilities"])
def test_cross_entropy(kind, weighted, smoothing):
    (z,) = logits(1)
    weight = torch.rand(C, generator=generator(1), dtype=torch.float64) if weighted else None
    target = torch.tensor([0, 5, -100, 2, 2, 1, 3])
    if kind == "probabilities":
        target = torch.rand(N, C, generator=generator(2), dtype=torch.float64)
    ours = reference.cross_entropy(z, target, weight, -100, smoothing)
    theirs = F.cross_entropy(z, target, weight, label_smoothing=smoothing, reduction="none")
    torch.testing.assert_close(ours, theirs)


def test_cross_entropy_by_hand():
    z = torch.tensor([[math.log(1.0), math.log(2.0), math.log(5.0)]], dtype=torch.float64)
    y = torch.tensor([2])
    assert reference.cross_entropy(z, y).item() == pytest.approx(math.log(8 / 5))
    expected = 0.7 * math.log(8 / 5) + 0.1 * sum(math.log(8 / n) for n in (1, 2, 5))
    found = reference.cross_entropy(z, y, label_smoothing=0.3).item()
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("t", [1.0, 2.5])
def test_divergences_against_torch_distributions(t):
    student, teacher = pair(t=t)
    q_i, q_j = Categorical(logits=student), Categorical(logits=teacher)
    forward, reverse = kl_divergence(q_j, q_i), kl_divergence(q_i, q_j)
    torch.testing.assert_close(reference.forward_kl(student, teacher, 0.5), forward)
    torch.testing.assert_close(reference.reverse_kl(student, teacher, 0.5), reverse)
    soft = forward + q_j.entropy()
    torch.testing.assert_close(reference.soft_ce(student, teacher, 0.5), soft)
    for beta in (0.5, 0.2):
        middle = Categorical(probs=beta * q_j.probs + (1 - beta) * q_i.probs)
        between = beta * kl_divergence(q_j, middle) + (1 - beta) * kl_divergence(q_i, middle)
        torch.testing.assert_close(reference.jsd(student, teacher, beta), between)
    torch.testing.assert_close(reference.jsd(student, teacher, 0.0), forward)
    torch.testing.assert_close(reference.jsd(student, teacher, 1.0), reverse)


def test_kl_against_kl_div_and_by_hand():
    student, teacher = pair()
    theirs = F.kl_div(student, teacher, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(reference.kl(teacher, student), theirs)
    a = torch.tensor([[0.5, 0.5]], dtype=torch.float64)
    b = torch.tensor([[0.25, 0.75]], dtype=torch.float64)
    expected = 0.5 * math.log(2.0) + 0.5 * math.log(2.0 / 3.0)
    assert reference.kl(a.log(), b.log()).item() == pytest.approx(expected)


def test_a_class_without_mass_adds_nothing():
    a = torch.tensor([[0.0, 0.5, 0.5]]).log()
    b = torch.tensor([[0.0, 0.25, 0.75]]).log()
    torch.testing.assert_close(reference.kl(a, b), reference.kl(a[:, 1:], b[:, 1:]))
    for name, function in reference.DIVERGENCES.items():
        expected = function(a[:, 1:], b[:, 1:], 0.5)
        torch.testing.assert_close(function(a, b, 0.5), expected, msg=name)
    full = torch.tensor([[0.2, 0.3, 0.5]]).log()
    assert reference.kl(full, a).item() == math.inf
    assert reference.kl(a, full).isfinite().all()


def test_near_identical_exits_keep_their_digits():
    """At KL of about 5e-6, float32: at least ten times closer to the truth than F.kl_div."""
    g = generator(0)
    base = 2.0 * torch.randn(64, 1000, generator=g, dtype=torch.float64)
    near = base + 3.2e-3 * torch.randn(64, 1000, generator=g, dtype=torch.float64)
    a, b = (F.log_softmax(x.float().double(), -1) for x in (base, near))
    truth = (a.exp() * (a - b)).sum(-1)
    assert 2e-6 < truth.mean().item() < 8e-6
    a, b = (reference.log_softmax(x.float()) for x in (base, near))
    ours = reference.kl(a, b).double()
    theirs = F.kl_div(b, a, log_target=True, reduction="none").sum(-1).double()
    errors = [((x - truth) / truth).square().mean().sqrt().item() for x in (ours, theirs)]
    assert errors[0] * 10.0 <= errors[1], errors


# Gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("beta", [0.5, 0.2, 0.0, 1.0])
def test_forward_formulas_are_differentiable(name, beta):
    student, teacher = (x[:3].requires_grad_() for x in logits(2))

    def value(s, t):
        log_q = [reference.log_softmax(x, 2.0) for x in (s, t)]
        return reference.DIVERGENCES[name](*log_q, beta)

    assert torch.autograd.gradcheck(value, (student, teacher))


def problem(kind, detach, name, beta):
    z, teachers = (x := logits(5, kind))[:3], x[3:]  # masked in the same classes
    z = [x.requires_grad_() for x in z]
    weight = torch.rand(3, 5, N, generator=generator(5), dtype=torch.float64)
    weight[0, 1] = 0.0
    wanted = [[bool(w.any()) for w in row] for row in weight]
    return z, (teachers, torch.tensor(1.7), name, beta, detach), weight, wanted


@pytest.mark.parametrize("kind", ["random", "confident", "near", "masked"])
@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize(
    ("name", "beta"), [(n, 0.3) for n in DIVERGENCES] + [("jsd", 0.0), ("jsd", 1.0)]
)
def test_closed_form_gradients_of_divergences(name, beta, detach, kind):
    z, options, weight, wanted = problem(kind, detach, name, beta)
    total = (weight * reference.divergence_matrix(z, *options, wanted)).sum()
    expected = torch.autograd.grad(total, z)
    closed = reference.divergence_gradients([x.detach() for x in z], *options, weight, wanted)
    for ours, truth in zip(closed, expected, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["index", "probabilities"])
def test_closed_form_gradient_of_cross_entropy(kind, smoothing, weighted):
    z = logits(1)[0].requires_grad_()
    weight = torch.rand(C, generator=generator(1), dtype=torch.float64) if weighted else None
    target = torch.tensor([0, 5, 4, 2, 2, 1, 3])
    if kind == "probabilities":
        target = torch.rand(N, C, generator=generator(2), dtype=torch.float64)
    ce = reference.cross_entropy(z, target, weight, label_smoothing=smoothing)
    (expected,) = torch.autograd.grad(ce.sum(), z)
    closed = reference.cross_entropy_gradient(z.detach(), target, weight, smoothing)
    torch.testing.assert_close(closed, expected)


def test_external_teachers_never_get_a_gradient():
    z, teacher = logits(2)[0].requires_grad_(), logits(1)[0].requires_grad_()
    matrix = reference.divergence_matrix([z], [teacher], 2.0, "forward_kl", 0.5, False, [[1, 1]])
    matrix.sum().backward()
    assert z.grad is not None
    assert teacher.grad is None


# Weights, rows, statistics --------------------------------------------------------------------


@pytest.mark.parametrize("exits", [1, 2, 3, 6])
def test_named_pair_weights(exits):
    matrices = {n: reference.pair_weight_matrix(n, exits) for n in reference.PAIR_WEIGHTS}
    for (name, matrix), i, j in itertools.product(matrices.items(), range(exits), range(exits)):
        expected = {
            "none": 0.0,
            "mutual": 1.0 / max(1, exits - 1) * (i != j),
            "last": 1.0 * (j == exits - 1 and i != j),
            "deeper": 1.0 / max(1, exits - 1 - i) * (j > i),
            "next": 1.0 * (j == i + 1),
        }[name]
        assert matrix[i][j] == expected, (name, i, j)


def test_valid_rows_and_mean_factors():
    target = torch.tensor([0, -100, 2, 1])
    weight = torch.tensor([0.5, 2.0, 4.0], dtype=torch.float64)
    like = torch.zeros((), dtype=torch.float64)
    valid = reference.valid_rows(target, 4, -100, like)
    assert valid.tolist() == [1.0, 0.0, 1.0, 1.0]
    labels, rows = reference.mean_factors(target, valid, weight, -100)
    assert (labels.item(), rows.item()) == (1 / 6.5, 1 / 3)
    none = reference.valid_rows(torch.full((4,), -100), 4, -100, like)
    assert reference.mean_factors(None, none, None, -100)[1].item() == 0.0
    assert reference.valid_rows(None, 2, -100, like).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("detach", [True, False])
def test_feature_distance(detach):
    f = [torch.randn(4, 2, 3, generator=generator(k), dtype=torch.float64) for k in range(3)]
    f = [x.requires_grad_() for x in f]
    distance = reference.feature_distance(f, detach)
    expected = torch.stack([(x - f[2]).square().flatten(1).sum(1) for x in f[:2]])
    torch.testing.assert_close(distance, expected)
    distance.sum().backward()
    torch.testing.assert_close(f[0].grad, 2 * (f[0] - f[2]).detach())
    assert (f[2].grad is None) == detach
    assert reference.feature_distance(f[:1]).shape == (0, 4)


def test_statistics_by_hand():
    z = torch.tensor([[1.0, 4.0, 3.0], [2.0, 2.0, 4.0]], dtype=torch.float64).log()
    found = [x.tolist() for x in reference.statistics(z)]
    p = [[1 / 8, 4 / 8, 3 / 8], [2 / 8, 2 / 8, 4 / 8]]
    entropy = [-sum(x * math.log(x) for x in row) for row in p]
    expected = [[math.log(8)] * 2, [0.5, 0.5], [1, 2], [1 / 8, 2 / 8], entropy]
    expected.append([sum(x * x for x in row) for row in p])
    for ours, truth in zip(found, expected, strict=True):
        assert ours == pytest.approx(truth)
    ties = reference.statistics(torch.zeros(1, 4))
    assert (ties[2].item(), ties[3].item()) == (0, 0.0)
    assert reference.statistics(torch.zeros(1, 1))[3].item() == 1.0

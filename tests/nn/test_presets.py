# SPDX-License-Identifier: Apache-2.0
"""Every preset against its formula in a few lines of plain PyTorch: value and gradient, float64.

The formulas are written for rows that all count; ignored rows are left out before they see them.
"""

from itertools import pairwise

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from msdkern import nn as msd_nn

ROWS, CLASSES, WIDTH = 6, 5, 7
SETTINGS_ARE_FLOAT32 = 1e-6  # 0.1 and the like are stored in float32


def cross_entropy(z, y, **options):
    return F.cross_entropy(z, y, **options)


def soft(teacher, student, t=1.0):
    """Soft cross entropy with a detached teacher, mean over rows."""
    target = torch.softmax(teacher.detach() / t, 1)
    return -(target * torch.log_softmax(student / t, 1)).sum(1).mean()


def kl(teacher, student, t=1.0, reduction="batchmean"):
    """KL(teacher || student), teacher detached."""
    target = torch.log_softmax(teacher.detach() / t, 1)
    return F.kl_div(torch.log_softmax(student / t, 1), target, log_target=True, reduction=reduction)


def labels(z, y, weight=None):
    weight = [1.0] * len(z) if weight is None else weight
    return sum(w * cross_entropy(s, y) for w, s in zip(weight, z, strict=True))


def others(z):
    return [(s, t) for i, s in enumerate(z) for j, t in enumerate(z) if i != j]


def later(z):
    return [(s, t) for i, s in enumerate(z) for t in z[i + 1 :]]


def byot_mask(a, b):
    return ((a > 0) | (b > 0)).double()


# name: formula(z, y, features, teachers). K = len(z).


def msd(z, y, f, _):
    pairs = sum(9 * kl(t, s, 3.0) for s, t in others(z)) / max(len(z) - 1, 1)
    hints = sum((a - f[-1].detach()).square().sum(1).mean() for a in f[:-1])
    return 0.9 * labels(z, y) + 0.1 * pairs + 1e-4 * hints


def byot(z, y, f, _):
    taught = sum(9 * soft(z[-1], s, 3.0) for s in z[:-1])
    target = f[-1].detach()
    hints = sum(((a - target) ** 2 * byot_mask(a, target)).sum() for a in f[:-1])
    return 0.9 * labels(z, y) + 0.1 * taught + 1e-6 * hints


def byot_journal(z, y, f, _):
    early = sum(0.7 * cross_entropy(s, y) + 0.3 * soft(z[-1], s, 3.0) for s in z[:-1])
    hints = sum(torch.dist(a, f[-1].detach()) for a in f[1:-1])
    return cross_entropy(z[-1], y) + early + 0.03 * hints


def scan(z, y, f, _):
    early = sum(0.5 * cross_entropy(s, y) + 9 * 0.5 * soft(z[-1], s, 3.0) for s in z[:-1])
    hints = sum(((a - f[-1].detach()) ** 2).sum() for a in f[:-1])
    return cross_entropy(z[-1], y) + early + 5e-7 * hints


def phuong_lampert(z, y, f, _):
    taught = sum(soft(z[-1], s, 1.0) for s in z[:-1])
    return 2 * 5 / len(z) * (0.5 * labels(z, y) + 0.5 * taught)


def phuong_lampert_constant(z, y, f, _):
    taught = sum(16 * soft(z[-1], s, 4.0) for s in z[:-1])
    return 2 * 5 / len(z) * (0.5 * labels(z, y) + 0.5 * taught)


def dks(z, y, f, _):
    return labels(z, y) + sum(kl(t, s) for s, t in others(z))


def dml_mean(z, y, f, _):
    return labels(z, y) + sum(kl(t, s) for s, t in others(z)) / max(len(z) - 1, 1)


def ztw(pairs):
    def formula(z, y, f, _):
        terms = [soft(t, s) for s, t in pairs(z)]
        return labels(z, y) / len(z) + 0.5 * sum(terms) / max(len(terms), 1)

    return formula


def sandwich(z, y, f, _):
    return cross_entropy(z[-1], y) + sum(soft(z[-1], s) for s in z[:-1])


def one(z, y, f, teachers):
    taught = sum(9 * kl(teachers[0], s, 3.0) for s in z)
    return labels(z, y) + cross_entropy(teachers[0], y) + taught


def exit_ensemble(z, y, f, _):
    teacher, feature = sum(z) / len(z), (sum(f) / len(f)).detach()
    taught = sum(9 * soft(teacher, s, 3.0) for s in z)
    hints = sum(((a - feature) ** 2 * byot_mask(a, feature)).mean() for a in f)
    return labels(z, y) + 0.1 * taught + hints


def mlcsd(z, y, f, teachers):
    taught = sum(16 * kl(t, s, 4.0) for s, t in zip(z, teachers, strict=True))
    return labels(z, y) + 9.0 * taught


def imta(z, y, f, teachers):
    early = [0.1 * cross_entropy(s, y) + 0.9 * 9 * mean_kl(teachers[0], s, 3.0) for s in z[:-1]]
    return cross_entropy(z[-1], y) + sum(early)


def mean_kl(teacher, student, t):
    """The default reduction of nn.KLDivLoss: mean over rows and classes."""
    return kl(teacher, student, t, "none").mean()


def kd(z, y, f, teachers):
    return 0.1 * labels(z, y) + 0.9 * 16 * sum(kl(teachers[0], s, 4.0) for s in z)


def dkd(z, y, f, teachers):
    return labels(z, y) + sum(16 * dkd_parts(teachers[0], s, y, 4.0) for s in z)


def dkd_parts(teacher, student, y, t):
    """Of probabilities: KL of (target, rest), and 8 KL of the rest renormalised."""
    index = y[:, None]
    a, b = torch.softmax(teacher / t, 1), torch.softmax(student / t, 1)
    a_y, b_y = a.gather(1, index), b.gather(1, index)
    target = a_y * (a_y / b_y).log() + (1 - a_y) * ((1 - a_y) / (1 - b_y)).log()
    a_rest, b_rest = a / (1 - a_y), b / (1 - b_y)
    rest = (a_rest * (a_rest / b_rest).log()).scatter(1, index, 0.0).sum(1)
    return (target[:, 0] + 8 * rest).mean()


def ofa(z, y, f, teachers):
    hard = sum(cross_entropy(s, y, label_smoothing=0.1) for s in z)
    return hard + sum(soft(teachers[0], s) for s in z)


def deit(z, y, f, teachers):
    return 0.5 * labels(z, y) + 0.5 * sum(mean_kl(teachers[0], s, 1.0) for s in z)


def gkd(z, y, f, teachers):
    def jsd(student):
        a, b = torch.softmax(teachers[0], 1), torch.softmax(student, 1)
        m = 0.25 * a + 0.75 * b
        return (0.25 * a * (a / m).log() + 0.75 * b * (b / m).log()).sum(1).mean()

    return sum(jsd(s) for s in z)


def hdkd(z, y, f, _):
    taught = [4 * kl(t, s, 2.0) for s, t in later(z)]
    weight = [0.5 * (i + j) for i in range(len(z)) for j in range(i + 1, len(z))]
    hard = labels(z, y, [1.0, 0.5, 2.0][: len(z)])
    return hard + sum(w * d for w, d in zip(weight, taught, strict=True))


def hdkd_options(exits):
    index = torch.arange(exits, dtype=torch.float32)
    return {
        "label_weight": [1.0, 0.5, 2.0][:exits],
        "pair_weight": 0.5 * (index[:, None] + index),
        "temperature": 2.0,
    }


def inverse_sqrt(z, y, f, _):
    scale = [(k + 1) ** -0.5 * (0.5 if k < len(z) - 1 else 1.0) for k in range(len(z))]
    return labels(z, y, [s / sum(scale) for s in scale])


def cumulative(z, y, f, _):
    scale = [sum(range(1, k + 2)) for k in range(len(z))]
    return labels(z, y, [s / sum(scale) for s in scale])


FORMULAS = {
    "ce": (lambda z, y, f, _: labels(z, y), {}),
    "deebert": (lambda z, y, f, _: labels(z, y, [1.0] * (len(z) - 1) + [0.0]), {}),
    "pabee": (
        lambda z, y, f, _: labels(z, y, range(1, len(z) + 1)) / sum(range(1, len(z) + 1)),
        {},
    ),
    "sdn": (
        lambda z, y, f, _: labels(z, y, [0.01 if len(z) > 1 else 1.0, 0.01, 1.0][: len(z)]),
        {},
    ),
    "layerskip": (cumulative, {}),
    "layerskip inverse_sqrt": (inverse_sqrt, {"scale": "inverse_sqrt", "early_scale": 0.5}),
    "msd": (msd, {}),
    "dks": (dks, {}),
    "dml": (dks, {}),
    "dml mean": (dml_mean, {"average": True}),
    "byot": (byot, {}),
    "byot_journal": (byot_journal, {}),
    "scan": (scan, {}),
    "phuong_lampert": (phuong_lampert, {}),
    "phuong_lampert constant": (
        phuong_lampert_constant,
        {"temperature": 4.0, "adaptive": False},
    ),
    "ztw_last": (ztw(lambda z: [(s, z[-1]) for s in z[:-1]]), {"weight": 0.5}),
    "ztw_all": (ztw(later), {"weight": 0.5}),
    "ztw_next": (ztw(lambda z: list(pairwise(z))), {"weight": 0.5}),
    "fastbert": (lambda z, y, f, _: sum(kl(z[-1], s) for s in z[:-1]) + 0 * z[-1].sum(), {}),
    "slimmable": (sandwich, {}),
    "hdkd": (hdkd, hdkd_options),
    "one": (one, {}),
    "exit_ensemble": (exit_ensemble, {}),
    "mlcsd": (mlcsd, {}),
    "imta": (imta, {}),
    "kd": (kd, {}),
    "dkd": (dkd, {}),
    "ofa": (ofa, {}),
    "deit": (deit, {}),
    "gkd": (gkd, {"beta": 0.25}),
}
"""The name of the preset, and of a variant after a space: the formula and the options."""


class Case:
    """A preset, its formula, and inputs that require gradient; row 1 is ignored."""

    def __init__(self, key, exits, dtype=torch.float64):
        generator = torch.Generator().manual_seed(exits)

        def random(width):
            return torch.randn(ROWS, width, generator=generator, dtype=dtype)

        name = key.split()[0]
        self.formula, options = FORMULAS[key]
        options = options(exits) if callable(options) else options
        self.criterion = msd_nn.create(name, exits, **options)
        self.logits = [(2 * random(CLASSES)).requires_grad_() for _ in range(exits)]
        self.features = [random(WIDTH).requires_grad_() for _ in range(exits)]
        self.target = torch.tensor([3, -100, 0, 4, 1, 0])
        count = exits if name == "mlcsd" else 1
        self.teachers = [2 * random(CLASSES) for _ in range(count)]
        if name == "one":
            self.teachers[0].requires_grad_()

    def leaves(self):
        own = [*self.logits, *self.teachers]
        own += self.features if self.criterion.needs_features else []
        return [leaf for leaf in own if leaf.requires_grad]

    def call(self):
        features = self.features if self.criterion.needs_features else None
        teachers = self.teachers if self.criterion.needs_teacher else None
        return self.criterion(self.logits, self.target, features, teachers)

    def expected(self):
        valid = self.target != -100
        lists = (self.logits, self.features, self.teachers)
        z, f, t = ([x[valid] for x in tensors] for tensors in lists)
        return self.formula(z, self.target[valid], f, t)


def gradients(loss, leaves):
    return torch.autograd.grad(loss, leaves, materialize_grads=True)


@pytest.mark.parametrize("exits", [1, 3])
@pytest.mark.parametrize("key", FORMULAS)
def test_value_and_gradient_are_those_of_the_formula(key, exits):
    case = Case(key, exits)
    loss, expected = case.call(), case.expected()
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(loss, expected, rtol=SETTINGS_ARE_FLOAT32, atol=1e-12)
    if not expected.requires_grad:
        return
    leaves = case.leaves()
    for found, wanted in zip(gradients(loss, leaves), gradients(expected, leaves), strict=True):
        torch.testing.assert_close(found, wanted, rtol=SETTINGS_ARE_FLOAT32, atol=1e-10)


@pytest.mark.parametrize("key", FORMULAS)
def test_every_exit_gets_a_gradient_and_an_ignored_row_a_zero_one(key):
    case = Case(key, 3, torch.float32)
    case.call().backward()
    for leaf in case.leaves():
        assert leaf.grad is not None
        assert not leaf.grad[1].any()


@pytest.mark.parametrize("key", FORMULAS)
def test_all_rows_ignored_is_a_loss_of_zero(key):
    case = Case(key, 3, torch.float32)
    case.target.fill_(-100)
    loss = case.call()
    loss.backward()
    assert loss == 0
    assert not any(leaf.grad.any() for leaf in case.leaves())


@pytest.mark.parametrize("key", FORMULAS)
def test_nothing_is_read_on_the_host(key):
    with FakeTensorMode(allow_non_fake_inputs=True):  # reading a value here raises
        case = Case(key, 3, torch.float32)
        case.target = torch.empty(ROWS, dtype=torch.int64)
        case.call().backward()
    assert set(case.criterion.terms) >= {"loss", "cross_entropy", "divergence"}


def test_every_preset_has_a_formula_here_and_a_description():
    assert {key.split()[0] for key in FORMULAS} == set(msd_nn.names())
    for name in msd_nn.names():
        formula, _, source = msd_nn.describe(name).partition("\n\n")
        assert formula.startswith(f"{name}: ")
        assert "Options: " in source


def test_options_of_the_general_criterion_reach_every_preset():
    case = Case("byot", 3)
    case.criterion = msd_nn.create("byot", 3, ignore_index=0, reduction="sum", beta=0.0)
    case.target[1] = 2
    valid = case.target != 0
    z = [x[valid] for x in case.logits]
    expected = 0.9 * labels(z, case.target[valid])
    expected = expected + 0.1 * sum(9 * soft(z[-1], s, 3.0) for s in z[:-1])
    loss = case.criterion(case.logits, case.target)
    torch.testing.assert_close(loss, expected * valid.sum(), rtol=SETTINGS_ARE_FLOAT32, atol=0)


def test_sdn_weights_grow_with_progress():
    case = Case("sdn", 3)
    case.criterion.set_progress(0.5)
    expected = torch.tensor([0.01 + 0.225, 0.01 + 0.45, 1.0])
    torch.testing.assert_close(case.criterion.exit_weight, expected)
    case.criterion.set_progress(1.0)
    torch.testing.assert_close(case.criterion.exit_weight, torch.tensor([0.45, 0.9, 1.0]))


@pytest.mark.parametrize(
    ("name", "options", "values"),
    [
        ("one", {"ramp": 0.5}, {0.0: 0.006737947, 0.25: 0.2865048, 0.5: 1.0, 1.0: 1.0}),
        ("dkd", {"warmup": 0.5}, {0.0: 0.0, 0.25: 0.5, 0.5: 1.0, 1.0: 1.0}),
        ("one", {}, {0.0: 1.0, 1.0: 1.0}),
    ],
)
def test_ramps_follow_progress(name, options, values):
    criterion = msd_nn.create(name, 3, **options)
    for progress, weight in values.items():
        criterion.set_progress(progress)
        torch.testing.assert_close(criterion.pair_scale, torch.tensor(weight))


@pytest.mark.parametrize(("scale", "grows"), [(0.0, False), (50.0, True)])
def test_adaptive_temperature_grows_when_the_teacher_is_too_sure(scale, grows):
    case = Case("phuong_lampert", 3)
    with torch.no_grad():
        for z in case.logits:
            z.mul_(scale)
    loss = case.call()
    assert case.criterion.temperature == (torch.tensor(1.05) if grows else 1.0)
    # This step was still taken at T = 1, backward included, and a second backward as well.
    wanted = gradients(case.expected(), case.logits)
    for _ in range(2):
        found = torch.autograd.grad(loss, case.logits, retain_graph=True)
        torch.testing.assert_close(found, wanted, rtol=SETTINGS_ARE_FLOAT32, atol=1e-10)
    case.criterion.eval()
    before = case.criterion.temperature.clone()
    case.call()
    assert case.criterion.temperature == before


def test_adaptive_temperature_looks_at_valid_rows_only():
    case = Case("phuong_lampert", 3)
    case.criterion = msd_nn.create("phuong_lampert", 3, bound=0.3)
    with torch.no_grad():
        case.logits[-1].zero_()[1, 0] = 50.0  # 0.2 without the ignored row 1, 0.33 with it
    case.call()
    assert case.criterion.temperature == 1.0


def test_dkd_of_equal_weights_is_kd_where_the_teacher_spreads_evenly():
    """KL = TCKD + (1 - p_y) NCKD: with NCKD = 0 the target part alone is the divergence."""
    y = torch.tensor([0, 1, 2])
    teacher = torch.eye(3, 4, dtype=torch.float64)
    student = (3 * teacher).requires_grad_()
    criterion = msd_nn.create("dkd", 1, temperature=2.0)
    loss = criterion([student], y, None, [teacher])
    expected = cross_entropy(student, y) + 4 * kl(teacher, student, 2.0)
    torch.testing.assert_close(loss, expected)


def test_dkd_refuses_two_classes_and_soft_labels():
    z = [torch.zeros(2, 2)]
    with pytest.raises(ValueError, match="at least 3 classes; got 2"):
        msd_nn.create("dkd", 1)(z, torch.tensor([0, 1]), None, z)
    z = [torch.zeros(2, 3)]
    with pytest.raises(ValueError, match=r"target must be int64 \[N\]"):
        msd_nn.create("dkd", 1)(z, torch.full((2, 3), 1 / 3), None, z)


def test_hdkd_returns_the_gradient_of_its_weights():
    case = Case("hdkd", 3)
    case.call()
    terms = case.criterion.terms
    valid = case.target != -100
    z = [x[valid] for x in case.logits]
    expected = [cross_entropy(s, case.target[valid]) for s in z]
    torch.testing.assert_close(terms["cross_entropy"], torch.stack(expected))
    assert terms["pair_divergence"].shape == (3, 3)
    torch.testing.assert_close(terms["pair_divergence"][0, 2], kl(z[2], z[0], 2.0))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: msd_nn.create("foo", 3), ValueError, "name must be one of ce, .*; got 'foo'"),
        (lambda: msd_nn.describe("foo"), ValueError, "got 'foo'"),
        (lambda: msd_nn.create("ce", 0), ValueError, "exits must be at least 1; got 0"),
        (lambda: msd_nn.create("kd", 3, alfa=1), TypeError, "kd takes alpha, beta, .*; got alfa"),
        (lambda: msd_nn.create("layerskip", 3, scale="x"), ValueError, "got 'x'"),
        (lambda: msd_nn.create("kd", 1)([torch.zeros(2, 3)]), ValueError, "teacher_logits are"),
    ],
)
def test_errors_are_one_sentence(call, error, words):
    with pytest.raises(error, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)

# SPDX-License-Identifier: Apache-2.0
"""`multi_exit_loss` and `multi_exit_row_losses` on every executor: values and gradients against
float64, for every option, kind of logits, layout and dtype."""

import itertools
import math

import hypothesis
import pytest
import torch

import msdkern
from msdkern import reference
from tests import oracle
from tests.cases import (
    CHOICES,
    DIVERGENCES,
    DTYPES,
    KINDS,
    cases,
    generator,
    leaves,
    make_case,
    per_exit,
    property_test,
)
from tests.servers import SERVERS, serve


class Judge:
    """Truth, PyTorch's result and the sizes of the terms for one case; judges every executor."""

    def __init__(self, case, names, upstream):
        self.case, self.problem = case, case.problem
        self.dtype = case.problem.logits[0].dtype
        self.true, self.peer = oracle.truth(case.problem), oracle.peer(case.problem)
        self.exact = oracle.gradients(self.true, [self.true[n] for n in names], upstream)
        self.theirs = oracle.gradients(self.peer, [self.peer[n] for n in names], upstream)

    def value(self, server, name, ours, size):
        what = f"{server} {name}"
        oracle.check(what, ours, self.true[name], self.peer[name], size, self.dtype)

    def gradients(self, server, given, sizes):
        found = [x.grad for x in given] if isinstance(given, list) else given.grad
        for k, g in enumerate(per_exit(found)):
            assert g.dtype == self.dtype
            what, theirs = f"{server} gradient of exit {k}", self.theirs[k].to(self.dtype)
            oracle.check(what, g, self.exact[k], theirs, sizes[k], self.dtype)


def check_loss(case, servers):
    """The scalar loss, everything it reports, and its gradient."""
    problem = case.problem
    judge = Judge(case, ["loss"], [torch.tensor(case.upstream, dtype=torch.float64)])
    (r_ce, r_rows), (m_ce, m_rows) = problem.factors(), problem.mean_factors()
    ones = torch.full(problem.shape[:2], abs(case.upstream), dtype=torch.float64)
    size = oracle.magnitudes(problem, ones * r_ce, ones * r_rows)
    ce, divergence = size["row_cross_entropy"], size["row_divergence"]
    sizes = {
        "loss": r_ce * ce.sum() + r_rows * divergence.sum(),
        "cross_entropy": m_ce * (ce / problem.exit_weights()).sum(-1),
        "divergence": m_rows * divergence.sum(-1),
        "confidence": 1.0,
    }
    if problem.option("pair_divergence"):
        sizes["pair_divergence"] = m_rows * size["pairs"].sum(-1)
    expected = torch.stack([x.double().argmax(-1) for x in problem.logits])
    before = [x.clone() for x in per_exit(case.given)]
    for server in servers:
        given = leaves(case.given)
        with serve(server):
            out = msdkern.multi_exit_loss(given, **problem.options)
            out.loss.backward(torch.tensor(case.upstream, dtype=out.loss.dtype))
        for name, terms in sizes.items():
            judge.value(server, name, getattr(out, name), terms)
        assert torch.equal(out.prediction, expected)
        assert (out.pair_divergence is None) != problem.option("pair_divergence")
        assert out.loss.dtype == reference.accumulation_dtype(judge.dtype)
        judge.gradients(server, given, size["gradients"])
        for now, then in zip(per_exit(case.given), before, strict=True):
            assert torch.equal(now, then), f"{server}: the caller's logits were written to"


def check_rows(case, servers):
    """The row losses, and their gradient for an upstream gradient per exit and row."""
    problem = case.problem
    dropped = ("reduction", "normalizer", "pair_divergence")
    options = {k: v for k, v in problem.options.items() if k not in dropped}
    dtype = reference.accumulation_dtype(problem.logits[0].dtype)
    upstream = [
        torch.randn(problem.shape[:2], generator=generator(i), dtype=dtype) for i in range(2)
    ]
    judge = Judge(case, ["row_cross_entropy", "row_divergence"], upstream)
    size = oracle.magnitudes(problem, *(g.double().abs() for g in upstream))
    for server in servers:
        given = leaves(case.given)
        with serve(server):
            out = msdkern.multi_exit_row_losses(given, **options)
            torch.autograd.backward(list(out), upstream)
        for name, ours in out._asdict().items():
            assert ours.dtype == dtype
            judge.value(server, f"row_{name}", ours, size[f"row_{name}"])
        judge.gradients(server, given, size["gradients"])


@hypothesis.given(cases())
@hypothesis.settings(property_test, max_examples=150)
def test_loss_and_gradient(case):
    check_loss(case, SERVERS)


@hypothesis.given(cases())
@hypothesis.settings(property_test, max_examples=60)
def test_row_losses_and_gradient(case):
    check_rows(case, SERVERS)


PLAIN = {
    "kind": "random", "layout": "contiguous", "pairs": "mutual", "teachers": 0, "target": "index",
    "ignored": 0.3, "exit_weight": 0, "class_weight": False, "pair_scale": 1.0,
    "temperature": 3.0, "temperature_squared": True, "divergence": "forward_kl", "beta": 0.5,
    "detach_teacher": True, "ignore_index": -100, "label_smoothing": 0.0, "reduction": "mean",
    "normalizer": None, "pair_divergence": False, "seed": 1, "dtype": torch.float32,
    "upstream": 1.0,
}  # fmt: skip
assert PLAIN.keys() == CHOICES.keys()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_logits(kind, dtype):
    for divergence, detach in itertools.product(DIVERGENCES, (True, False)):
        chosen = {"kind": kind, "dtype": dtype, "divergence": divergence, "detach_teacher": detach}
        check_loss(make_case(PLAIN | chosen, (4, 6, 37)), SERVERS)


# Beyond what a core keeps of a row set, the kernels recompute, window by window.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "chosen",
    [
        {"pairs": "mutual"},
        {"pairs": "mutual", "temperature": 2.5, "label_smoothing": 0.1},
        {"pairs": "matrix", "teachers": 2, "target": "probabilities"},
        {"pairs": "deeper", "divergence": "reverse_kl"},
        {"pairs": "last", "divergence": "jsd", "detach_teacher": False, "class_weight": True},
        {"pairs": None, "kind": "masked_some"},
        {"pairs": "next", "kind": "masked_some", "pair_divergence": True},
    ],
    ids=lambda chosen: "-".join(str(v) for v in chosen.values()),
)
@pytest.mark.parametrize("shape", [(3, 3, 263), (4, 2, 9001)], ids=str)
def test_many_classes(shape, chosen, dtype):
    check_loss(make_case(PLAIN | chosen | {"dtype": dtype}, shape), SERVERS)
    check_rows(make_case(PLAIN | chosen | {"dtype": dtype}, shape), SERVERS)


# Gradients that no cache holds are written past them, exponentials of long rows taken again.
@pytest.mark.parametrize(
    ("chosen", "shape"),
    [
        ({"pairs": "mutual", "kind": "confident"}, (2, 17, 262144)),
        ({"pairs": "mutual", "label_smoothing": 0.1, "temperature": 2.5}, (2, 17, 262144)),
        ({"pairs": "last", "dtype": torch.bfloat16}, (2, 17, 524288)),
        ({"pairs": "deeper", "divergence": "soft_ce"}, (3, 350, 8192)),
        ({"pairs": None, "kind": "masked_some"}, (2, 600, 8192)),
    ],
    ids=str,
)
def test_more_gradients_than_a_cache_holds(chosen, shape):
    check_loss(make_case(PLAIN | chosen, shape), SERVERS)


# Long rows without so many gradients: exponentials are taken again before the sweeps of named
# weights and of matrices, unrolled for up to eight exits, and before those of the careful pairs.
@pytest.mark.parametrize(
    ("chosen", "shape"),
    [
        ({"pairs": "mutual"}, (5, 2, 25013)),
        ({"pairs": "mutual", "dtype": torch.bfloat16, "temperature": 2.0}, (3, 2, 41203)),
        ({"pairs": "mutual", "temperature": 2.5, "target": "probabilities"}, (9, 2, 7103)),
        ({"pairs": "mutual", "dtype": torch.float64, "temperature": 4.0}, (4, 2, 15613)),
        ({"pairs": "mutual", "dtype": torch.float16}, (2, 2, 62003)),
        ({"pairs": "mutual", "kind": "masked_some"}, (2, 3, 62003)),
        ({"pairs": "matrix", "temperature": 1.0}, (4, 2, 31013)),
        ({"pairs": "matrix", "teachers": 1, "kind": "confident"}, (3, 2, 31013)),
        ({"pairs": "last", "divergence": "soft_ce"}, (4, 2, 31013)),
        ({"pairs": "deeper", "label_smoothing": 0.1}, (4, 2, 31013)),
        ({"pairs": "next", "kind": "near"}, (4, 2, 31013)),
        ({"pairs": None, "class_weight": True}, (1, 3, 124001)),
        (
            {
                "pairs": "deeper",
                "divergence": "reverse_kl",
                "dtype": torch.float64,
                "temperature": 2.5,
            },
            (9, 1, 61007),
        ),
    ],
    ids=str,
)
def test_long_rows(chosen, shape):
    check_loss(make_case(PLAIN | chosen, shape), SERVERS)
    check_rows(make_case(PLAIN | chosen, shape), SERVERS)


# Of short rows as many samples at once as a vector has lanes, as columns or in place: full groups,
# remainders, several blocks.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "chosen",
    [
        {"pairs": "mutual"},
        {"pairs": "mutual", "kind": "masked_some", "class_weight": True, "exit_weight": 2},
        {"pairs": "matrix", "teachers": 1, "temperature": 2.5},
        {"pairs": "deeper", "divergence": "soft_ce", "layout": "slice"},
        {"pairs": "last", "normalizer": 5.0, "temperature": 2.0},
        {"pairs": None},
    ],
    ids=lambda chosen: "-".join(str(v) for v in chosen.values()),
)
@pytest.mark.parametrize("shape", [(3, 37, 10), (2, 611, 17), (5, 33, 64), (4, 49, 131)], ids=str)
def test_many_rows(shape, chosen, dtype):
    check_loss(make_case(PLAIN | chosen | {"dtype": dtype}, shape), SERVERS)
    check_rows(make_case(PLAIN | chosen | {"dtype": dtype}, shape), SERVERS)


@pytest.mark.parametrize("exits", range(1, 33))
def test_every_number_of_exits(exits):
    pairs = ("mutual", "deeper", "matrix", "next", "last")[exits % 5]
    check_loss(make_case(PLAIN | {"pairs": pairs}, (exits, 2, 11)), SERVERS)


def test_the_most_exits_and_teachers():
    check_loss(make_case(PLAIN | {"pairs": "matrix", "teachers": 32}, (32, 1, 5)), SERVERS)


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize(("classes", "closer"), [(40, 3.0), (1000, 10.0)])
@pytest.mark.parametrize("pairs", ["mutual", "last", "matrix"])
def test_near_identical_exits_keep_their_digits(pairs, classes, closer, server):
    """At KL of about 5e-6, float32: several times closer to the truth than F.kl_div."""
    g = generator(0)
    base = 2.0 * torch.randn(64, classes, generator=g)
    z = [base + 2.3e-3 * torch.randn(64, classes, generator=g) for _ in range(3)]
    weight = torch.ones(3, 3) - torch.eye(3) if pairs == "matrix" else pairs
    problem = oracle.Problem(z, {"pair_weight": weight})
    with serve(server):
        ours = msdkern.multi_exit_row_losses(z, **problem.options).divergence
    truth, peer = (f(problem)["row_divergence"].detach() for f in (oracle.truth, oracle.peer))
    seen = truth.sum(1) > 0
    errors = [((x - truth)[seen] / truth[seen]).square().mean().sqrt() for x in (ours, peer)]
    assert 2e-6 < truth[seen].mean() < 2e-5
    assert errors[0] * closer <= errors[1], errors


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("classes", [1000, 4096])
def test_differences_of_one_sign_keep_their_digits(classes, server):
    """One class apart, all others nearer by the same small number: nothing averages out. At KL of
    5e-7 F.kl_div has no digit left; half a unit in the last place of q = 1/2 is 6 % of it."""
    z = [torch.zeros(20, classes) for _ in range(2)]
    for k, shift in enumerate((2e-3, 0.0)):
        z[k][:, 0] = math.log(classes - 1) + shift
    problem = oracle.Problem(z, {"pair_weight": "mutual"})
    with serve(server):
        ours = msdkern.multi_exit_row_losses(z, **problem.options).divergence
    truth, peer = (f(problem)["row_divergence"].detach() for f in (oracle.truth, oracle.peer))
    errors = [((x - truth) / truth).abs().max() for x in (ours, peer)]
    assert 5 * errors[0] < min(1.0, errors[1]), errors

# SPDX-License-Identifier: Apache-2.0
"""Executor `triton` in Triton's interpreter, against the oracle of the other executors.

Run by test_triton.py in a process of its own, with TRITON_INTERPRET=1: the setting holds for a
whole process. A few samples each, as the interpreter is slow.
"""

import itertools

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

import msdkern
from msdkern.executors.triton import launch, table
from msdkern.executors.triton.math import log_of_normal, log_of_sum
from tests.cases import DTYPES, KINDS, generator, lay_out, make_case, make_logits
from tests.ops.test_loss import PLAIN, check_loss, check_rows
from tests.ops.test_softmax import check_softmax
from tests.ops.test_statistics import check_statistics, tied_and_nan
from tests.servers import serve

TRITON = ("triton",)

# Every option at least twice, odd shapes; N = 0, C = 1 and K = 1 among them.
CASES = [
    ((3, 5, 10), {}),
    ((1, 3, 1), {"pairs": "mutual"}),
    ((2, 0, 4), {"pairs": "last", "pair_divergence": True}),
    ((4, 3, 37), {"pairs": "deeper", "layout": "slice", "exit_weight": 1}),
    ((4, 3, 37), {"pairs": "next", "layout": "expanded", "divergence": "soft_ce"}),
    ((4, 3, 37), {"pairs": "last", "divergence": "soft_ce", "temperature": 0.5}),
    ((3, 3, 33), {"pairs": "deeper", "divergence": "soft_ce", "layout": "transposed"}),
    ((3, 3, 33), {"pairs": "mutual", "divergence": "soft_ce", "temperature_squared": False}),
    ((3, 4, 17), {"pairs": "matrix", "teachers": 2, "divergence": "soft_ce", "layout": "stacked"}),
    ((3, 4, 17), {"pairs": "rows", "teachers": 1, "pair_scale": 0.3, "exit_weight": 2}),
    ((3, 4, 16), {"pairs": "rows", "teachers": 1, "divergence": "jsd", "beta": 0.2}),
    ((3, 4, 16), {"pairs": "matrix", "divergence": "jsd", "beta": 1.0, "detach_teacher": False}),
    ((3, 4, 16), {"pairs": "mutual", "divergence": "reverse_kl", "detach_teacher": False}),
    ((4, 2, 16), {"pairs": "deeper", "divergence": "reverse_kl", "layout": "columns"}),
    ((3, 4, 16), {"pairs": "deeper", "detach_teacher": False, "pair_divergence": True}),
    ((3, 4, 15), {"pairs": "next", "divergence": "soft_ce", "detach_teacher": False}),
    ((3, 4, 15), {"pairs": "matrix", "teachers": 1, "pair_divergence": True}),
    ((2, 4, 8), {"pairs": None, "pair_divergence": True, "divergence": "jsd", "beta": 0.5}),
    ((2, 4, 8), {"pairs": "mutual", "divergence": "reverse_kl", "pair_divergence": True}),
    ((2, 4, 9), {"pairs": None, "class_weight": True, "label_smoothing": 0.1}),
    ((2, 4, 9), {"pairs": None, "class_weight": True, "reduction": "sum"}),
    ((2, 4, 9), {"target": "probabilities", "class_weight": True, "label_smoothing": 0.1}),
    ((2, 4, 9), {"target": None, "normalizer": 3.5, "upstream": -0.75}),
    ((2, 4, 9), {"ignored": 1.0, "ignore_index": -1, "class_weight": True}),
    ((2, 4, 9), {"target": "probabilities", "normalizer": 3.5, "upstream": 3.0}),
    ((32, 1, 5), {"pairs": "mutual"}),
]
FORMS = {"loss": check_loss, "rows": check_rows}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("number", "shape", "chosen"),
    [(i, *case) for i, case in enumerate(CASES)],
    ids=["-".join(map(str, (*shape, *chosen.values()))) for shape, chosen in CASES],
)
def test_options(number, shape, chosen, form):
    dtype = DTYPES[number % 4]
    FORMS[form](make_case(PLAIN | {"dtype": dtype} | chosen, shape), TRITON)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_every_kind_of_logits(kind):
    dtypes = itertools.cycle(DTYPES[1:])
    for pairs in ("mutual", "deeper", "next", "matrix"):
        chosen = {"kind": kind, "pairs": pairs, "dtype": next(dtypes)}
        check_loss(make_case(PLAIN | chosen, (3, 2, 21)), TRITON)
    for divergence in ("reverse_kl", "jsd"):
        chosen = {"kind": kind, "divergence": divergence, "detach_teacher": False}
        check_loss(make_case(PLAIN | chosen, (2, 2, 21)), TRITON)


@pytest.fixture
def sweeping(monkeypatch):
    """Blocks of 16 classes, none of which holds a row: every kernel sweeps."""
    monkeypatch.setattr(table, "stacks", lambda *a: False)
    monkeypatch.setattr(table, "loss_plan", lambda *a: table.Plan(False, 1, 16, 4))
    monkeypatch.setattr(table, "row_plan", lambda *a: table.Plan(False, 2, 16, 4))


SWEPT = [
    {"pairs": "mutual", "ignored": 0.3},
    {"pairs": "last", "kind": "masked_some", "class_weight": True},
    {"pairs": "deeper", "label_smoothing": 0.1, "class_weight": True},
    {"pairs": "next", "target": "probabilities", "temperature": 2.7},
    {"pairs": "matrix", "teachers": 1, "pair_divergence": True, "kind": "confident"},
    {"pairs": "last", "divergence": "jsd", "detach_teacher": False, "kind": "near"},
    {"pairs": "mutual", "divergence": "reverse_kl", "label_smoothing": 0.1, "kind": "masked"},
    {"pairs": "mutual", "divergence": "soft_ce", "pair_divergence": True},
    {"pairs": None, "kind": "minus_1e4"},
]


@pytest.mark.parametrize("classes", [16, 53])
@pytest.mark.parametrize("number", range(len(SWEPT)))
def test_sweeps(number, classes, sweeping):
    chosen = {"dtype": DTYPES[number % 4]} | SWEPT[number]
    check_loss(make_case(PLAIN | chosen, (3, 2, classes)), TRITON)
    check_rows(make_case(PLAIN | chosen, (3, 2, classes)), TRITON)


@pytest.fixture
def stacking(monkeypatch):
    """Exits as an axis of the tile, however few; blocks of 16 classes."""
    monkeypatch.setattr(table, "stacks", lambda *a: True)
    monkeypatch.setattr(table, "stacked_plan", lambda *a: table.Plan(False, 1, 16, 4))


STACKED = [
    ((3, 4, 37), {"pairs": "mutual", "ignored": 0.3, "exit_weight": 2}),
    ((3, 4, 37), {"pairs": "deeper", "layout": "slice", "exit_weight": 1, "upstream": 3.0}),
    ((5, 3, 16), {"pairs": "next", "layout": "expanded", "label_smoothing": 0.1}),
    ((4, 3, 33), {"pairs": "last", "target": "probabilities", "class_weight": True}),
    ((4, 3, 33), {"pairs": "mutual", "divergence": "soft_ce", "target": "probabilities"}),
    ((3, 3, 20), {"pairs": "deeper", "divergence": "soft_ce", "layout": "stacked"}),
    ((3, 3, 20), {"pairs": "next", "divergence": "soft_ce", "temperature": 0.5}),
    ((3, 3, 20), {"pairs": "last", "divergence": "soft_ce", "label_smoothing": 0.1}),
    ((2, 4, 9), {"pairs": None, "class_weight": True, "label_smoothing": 0.1}),
    ((2, 4, 9), {"pairs": None, "class_weight": True, "reduction": "sum"}),
    ((2, 4, 9), {"target": None, "pairs": "deeper", "normalizer": 3.5, "upstream": -0.75}),
    ((1, 3, 1), {"pairs": "mutual"}),
    ((1, 3, 5), {"pairs": "deeper", "ignored": 1.0}),
    ((3, 3, 20), {"pairs": "mutual", "teachers": 1, "pair_divergence": True}),
]
# And those of the options that are met pair by pair.
STACKED += [
    (shape, chosen)
    for shape, chosen in CASES
    if {"matrix", "rows", "reverse_kl", "jsd"} & {chosen.get("pairs"), chosen.get("divergence")}
    or not chosen.get("detach_teacher", True)
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("number", range(len(STACKED)))
def test_exits_as_an_axis(number, form, stacking):
    shape, chosen = STACKED[number]
    FORMS[form](make_case(PLAIN | {"dtype": DTYPES[number % 4]} | chosen, shape), TRITON)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_exits_as_an_axis_for_every_kind_of_logits(kind, stacking):
    first = KINDS.index(kind) % 2
    for pairs, dtype in zip(
        ("mutual", "next", "deeper", "last")[first::2], DTYPES[1:], strict=False
    ):
        chosen = {"kind": kind, "pairs": pairs, "dtype": dtype}
        check_loss(make_case(PLAIN | chosen, (3, 2, 21)), TRITON)
    pairwise = ({"pairs": "matrix"}, {"divergence": "jsd"}, {"divergence": "reverse_kl"})[first:]
    for chosen, dtype in zip(pairwise, DTYPES[1:], strict=False):
        chosen = {"kind": kind, "pairs": "mutual", "detach_teacher": False, "dtype": dtype} | chosen
        check_loss(make_case(PLAIN | chosen, (2, 2, 21)), TRITON)


@pytest.mark.parametrize("pairs", ["mutual", "last", "deeper", "next"])
def test_exits_as_an_axis_beside_a_teacher_without_weight_that_holds_nan(pairs, stacking):
    given = make_logits("random", (4, 3, 21), torch.float32)
    z, bad = given[:3], given[3]
    bad[0, 5] = torch.nan
    found = {}
    for server in ("eager", *TRITON):
        mine = [x.clone().requires_grad_() for x in z]
        with serve(server):
            out = msdkern.multi_exit_loss(
                mine, pair_weight=pairs, teacher_logits=[bad], pair_divergence=True
            )
        out.loss.backward()
        found[server] = [out.loss, *(x.grad for x in mine)]
    eager, triton = found.values()
    assert torch.isfinite(eager[0])
    torch.testing.assert_close(triton, eager)


DIRECT = [(pairs, "forward_kl") for pairs in ("mutual", "last", "deeper", "next", "matrix")]
GENERAL = [("mutual", "jsd"), ("matrix", "jsd"), ("matrix", "reverse_kl")]


@pytest.mark.parametrize(("pairs", "divergence"), DIRECT + GENERAL)
@pytest.mark.parametrize("axis", [False, True])
def test_an_exit_without_a_softmax(axis, pairs, divergence, request):
    """A NaN stays in its exit's cross entropy, in its row and in what learns from it; and where
    only some exits want a gradient."""
    if axis:
        request.getfixturevalue("stacking")
    z = make_logits("random", (4, 3, 21), torch.float32)
    z[3][1, 5] = torch.nan
    z[0][2] = -torch.inf
    y = torch.tensor([0, 1, 2])
    weight = msdkern.pairs.next(4) if pairs == "matrix" else pairs
    chosen = {"pair_weight": weight, "divergence": divergence}
    outcomes = []
    for server in ("eager", "triton"):
        leaves = [x.clone().requires_grad_(k in (0, 2)) for k, x in enumerate(z)]
        with msdkern.executor(server):
            out = msdkern.multi_exit_loss(leaves, y, **chosen)
            rows = msdkern.multi_exit_row_losses(leaves, y, **chosen)
            out.loss.backward()
        found = (out.prediction, rows.cross_entropy.detach(), rows.divergence.detach())
        outcomes.append([*found, leaves[0].grad, leaves[2].grad])
    for ours, theirs in zip(*reversed(outcomes), strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)


def exact_equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def outcome(z, y, **options):
    z = [x.detach().requires_grad_() for x in z]
    out = msdkern.multi_exit_loss(z, y, pair_weight="mutual", **options)
    out.loss.backward()
    return [out.loss.detach(), out.cross_entropy, out.divergence, *(x.grad for x in z)]


def test_batches_of_many_programs_add_up(monkeypatch):
    """More than one group of partial sums, counted by a launch of its own or by every program;
    bit-equal twice, and the tickets are left as they were found."""
    monkeypatch.setattr(table, "loss_plan", lambda *a: table.Plan(True, 1, 4, 4))
    z = make_logits("random", (1, 67, 3), torch.float32)
    y = torch.randint(3, (67,), generator=generator(0))
    y[::7] = -100
    with msdkern.executor("eager"):
        expected = outcome(z, y, class_weight=torch.tensor([0.5, 1.0, 2.0]))
    results = []
    for limit in (8192, 1, 1):
        monkeypatch.setattr(launch, "LABELS_EACH", limit)
        monkeypatch.setattr(launch, "SPAN", 1)
        with msdkern.executor("triton"):
            results.append(outcome(z, y, class_weight=torch.tensor([0.5, 1.0, 2.0])))
    for found in results:
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs)
    assert exact_equal(results[1], results[2])


@pytest.mark.parametrize("bad", [-1, 5, 1 << 40])
def test_a_label_out_of_range_is_an_error_or_nan(bad, monkeypatch):
    """On a GPU nothing may be read on the host: the row's terms become NaN, no other's."""
    z = make_logits("random", (2, 3, 5), torch.float32)
    y = torch.tensor([0, bad, 4])
    with msdkern.executor("triton"):
        with pytest.raises(ValueError, match=f"labels must be in .*; got {bad}$"):
            msdkern.multi_exit_loss(z, y)
        monkeypatch.setattr(launch, "check_labels", lambda *a: None)
        leaves = [x.requires_grad_() for x in z]
        assert msdkern.multi_exit_loss(leaves, y).loss.isnan()
        rows = msdkern.multi_exit_row_losses(leaves, y).cross_entropy
        rows.sum().backward()
    assert rows.isnan().tolist() == [[False, True, False]] * 2
    for x in leaves:
        assert x.grad.isnan().all(1).tolist() == [False, True, False]


def test_a_temperature_that_is_not_positive(monkeypatch):
    z = make_logits("random", (2, 3, 5), torch.float32)
    t = torch.tensor(-1.0)
    with msdkern.executor("triton"):
        with pytest.raises(ValueError, match="temperature must be positive and finite; got -1"):
            msdkern.multi_exit_softmax(z, t)
        monkeypatch.setattr(launch, "check_positive", lambda *a: None)
        assert msdkern.multi_exit_softmax(z, t)[0].isnan().all()
        assert msdkern.multi_exit_loss(z, pair_weight="mutual", temperature=t).loss.isnan()


@pytest.mark.parametrize(("normalizer", "expected"), [(0.0, 0.0), (torch.tensor(-1.0), torch.nan)])
def test_a_count_of_no_rows_and_no_count(normalizer, expected, monkeypatch):
    monkeypatch.setattr(launch, "check_count", lambda *a: None)
    z = [x.requires_grad_() for x in make_logits("random", (2, 3, 5), torch.float32)]
    with msdkern.executor("triton"):
        loss = msdkern.multi_exit_loss(z, pair_weight="mutual", normalizer=normalizer).loss
    torch.testing.assert_close(loss.detach(), torch.tensor(expected), equal_nan=True)
    gradient = torch.autograd.grad(loss, z)[0]
    torch.testing.assert_close(gradient, torch.full_like(gradient, expected), equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_softmax_and_statistics(dtype):
    for kind, layout in (("random", "slice"), ("masked", "columns"), ("minus_1e4", "transposed")):
        z = [lay_out(x, layout) for x in make_logits(kind, (2, 3, 19), dtype)]
        check_statistics(z, z, TRITON)
        for log in (False, True):
            check_softmax(z, z, 1.7, log, TRITON)


def test_softmax_and_statistics_by_sweeps(sweeping):
    for kind in ("random", "masked", "confident"):
        z = make_logits(kind, (2, 3, 53), torch.float32)
        check_statistics(z, z, TRITON)
        for log in (False, True):
            check_softmax(z, z, 0.5, log, TRITON)


@pytest.mark.parametrize("sweep", [False, True])
def test_ties_and_nan_as_torch_argmax(sweep, request):
    if sweep:
        request.getfixturevalue("sweeping")
    for classes in (1, 7, 40):
        z = tied_and_nan(6, classes, torch.float32, classes)
        for x in (z, torch.full((2, classes), -torch.inf)):
            with msdkern.executor("triton"):
                found = msdkern.exit_statistics([x]).prediction[0]
                loss = msdkern.multi_exit_loss([x]).prediction[0]
            assert torch.equal(found, x.argmax(-1))
            assert torch.equal(loss, x.argmax(-1))


@triton.jit
def log_kernel(x, y, COUNT: tl.constexpr, OF_SUM: tl.constexpr):
    i = tl.arange(0, COUNT)
    given = tl.load(x + i)
    tl.store(y + i, log_of_sum(given) if OF_SUM else log_of_normal(given))


def logs(x, of_sum=False):
    y = torch.empty_like(x)
    log_kernel[(1,)](x, y, COUNT=x.numel(), OF_SUM=of_sum)
    return y


@pytest.mark.parametrize(("first", "step"), [(0x00800000, 0x7F0), (0x3F000000, 0x10)])
def test_logarithms(first, step):
    """Of all normal numbers, and of those about 1. The interpreter rounds products of fused
    multiply-adds, which costs a quarter of a unit in the last place."""
    x = torch.arange(first, first + step * 2**20, step, dtype=torch.int32).view(torch.float32)
    exact = x.double().log()
    unit = torch.from_numpy(np.spacing(exact.abs().float().numpy())).double()
    assert bool(((logs(x).double() - exact).abs() <= 1.15 * unit).all())


def test_logarithms_of_sums():
    x = torch.tensor([1.0, torch.nan])
    for dtype in (torch.float32, torch.float64):
        torch.testing.assert_close(logs(x.to(dtype), True), x.to(dtype).log(), equal_nan=True)


def test_full_graph():
    z = [x.requires_grad_() for x in make_logits("random", (3, 4, 5), torch.float32)]
    y = torch.tensor([0, 1, 2, -100])

    def loss(z, t):
        return msdkern.multi_exit_loss(z, y, pair_weight="mutual", temperature=t).loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    with msdkern.executor("triton"):
        for t in (2.0, 3.0):
            found, expected = compiled(z, t), loss(z, t)
            torch.testing.assert_close(found, expected)
            gradients = [torch.autograd.grad(x, z) for x in (found, expected)]
            assert exact_equal(*gradients)


def test_it_serves_every_op():
    from msdkern import executors

    assert executors.device_type("triton") == "cpu"
    assert {cells["triton"] for cells in executors.table().values()} == {None}
    assert executors.select("multi_exit_loss", "cpu") != "triton"  # only where it is asked for

# SPDX-License-Identifier: Apache-2.0
"""The loss on the executor `cuda`, executed by the harness: the oracle and the cases of every
executor, every rung of the ladder, several orders of threads."""

import itertools
import math

import hypothesis
import pytest
import torch

import msdkern
from msdkern.executors import cuda
from tests.cases import (
    CHOICES,
    DIVERGENCES,
    DTYPES,
    Case,
    cases,
    generator,
    make_case,
    property_test,
)
from tests.ops import test_loss
from tests.ops.test_edges import check_that_nan_spreads
from tests.ops.test_loss import check_loss, check_rows
from tests.oracle import Problem

PLAIN = {
    "kind": "random", "layout": "contiguous", "pairs": "mutual", "teachers": 0, "target": "index",
    "ignored": 0.3, "exit_weight": 0, "class_weight": False, "pair_scale": 1.0,
    "temperature": 3.0, "temperature_squared": True, "divergence": "forward_kl", "beta": 0.5,
    "detach_teacher": True, "ignore_index": -100, "label_smoothing": 0.0, "reduction": "mean",
    "normalizer": None, "pair_divergence": False, "seed": 5, "dtype": torch.float32,
    "upstream": 1.0,
}  # fmt: skip
assert set(PLAIN) == set(CHOICES)


@hypothesis.given(cases())
@hypothesis.settings(property_test, max_examples=120)
def test_loss_and_gradient(on_cuda, case):
    check_loss(case, ["cuda"])


@hypothesis.given(cases())
@hypothesis.settings(property_test, max_examples=50)
def test_row_losses_and_gradient(on_cuda, case):
    check_rows(case, ["cuda"])


# Shapes that begin and end each rung for float32; the others follow from the bytes of an element.
RUNGS = {
    "8 lanes": (5, 7, 32),
    "16 lanes": (7, 5, 64),
    "a warp": (8, 3, 128),
    "8 lanes, tiled": (3, 6, 101),
    "a warp, tiled": (6, 5, 256),
    "a warp, all rows, tiled": (8, 3, 200),
    "a block, tiled": (7, 4, 1000),
    "a block, few exits": (2, 4, 2048),
    "8 lanes, shared": (9, 5, 32),
    "a warp, shared": (9, 3, 101),
    "a block, shared": (9, 2, 2048),
    "2 blocks": (3, 2, 8200),
    "8 blocks": (2, 2, 40000),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("pairs", ["mutual", "deeper", "next", "last", "matrix", None])
def test_every_rung(on_cuda, rung, dtype, pairs):
    shape = RUNGS[rung]
    if shape[2] > 2048 and pairs not in ("mutual", "matrix"):
        pytest.skip("the sweep is that of the smaller shapes")
    check_loss(make_case(PLAIN | {"dtype": dtype, "pairs": pairs}, shape), ["cuda"])


# Row sets that are large for their many rows: half a processor's memory, all of it, a cluster's.
@pytest.mark.parametrize("shape", [(20, 2, 1000), (32, 2, 1000), (12, 1, 8200)])
def test_many_exits(on_cuda, shape):
    check_loss(make_case(PLAIN, shape), ["cuda"])


# All shallow exits learn, as beside a frozen classifier: the sweeps of tile.cuh. Others: not.
@pytest.mark.parametrize("shape", [(6, 3, 64), (5, 3, 301), (4, 5, 96)])
@pytest.mark.parametrize("without", [(-1,), (-2, -1), (0,)])
def test_exits_that_need_no_gradient(on_cuda, shape, without):
    case = make_case(PLAIN, shape)
    every, some = ([x.clone() for x in case.problem.logits] for _ in range(2))
    still = [k % shape[0] for k in without]
    for k in range(shape[0]):
        every[k].requires_grad_()
        some[k].requires_grad_(k not in still)
    for z in (every, some):
        msdkern.multi_exit_loss(z, **case.problem.options).loss.backward()
    for k in range(shape[0]):
        if k in still:
            assert some[k].grad is None
        else:
            torch.testing.assert_close(some[k].grad, every[k].grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("order", ["lifo", "1", "2", "3", "4", "5"])
@pytest.mark.parametrize(
    "rung", ["8 lanes", "a warp, tiled", "a block, tiled", "a block, shared", "2 blocks"]
)
def test_every_order_of_threads(on_cuda, rung, order):
    on_cuda.set_order(order.encode())
    for change in ({}, {"divergence": "jsd", "detach_teacher": False}, {"ignored": 0.6}):
        check_loss(make_case(PLAIN | change, RUNGS[rung]), ["cuda"])


@pytest.mark.parametrize("layout", ["slice", "columns", "transposed", "expanded", "stacked"])
@pytest.mark.parametrize("classes", [1000, 1001, 4099])
def test_rows_that_do_not_begin_on_16_bytes(on_cuda, layout, classes):
    for dtype in (torch.float32, torch.bfloat16):
        chosen = PLAIN | {"layout": layout, "dtype": dtype}
        check_loss(make_case(chosen, (3, 3, classes)), ["cuda"])


@pytest.mark.parametrize("kind", ["masked", "masked_some", "confident", "near"])
@pytest.mark.parametrize("pairs", ["mutual", "deeper", "next", "last", "matrix"])
def test_logits_of_every_kind_in_registers(on_cuda, kind, pairs):
    check_loss(make_case(PLAIN | {"kind": kind, "pairs": pairs}, (4, 4, 64)), ["cuda"])


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "soft_ce"])
@pytest.mark.parametrize("pairs", ["mutual", "deeper"])
@pytest.mark.parametrize("detach", [True, False])
def test_named_pairs_of_every_divergence(on_cuda, divergence, pairs, detach):
    chosen = PLAIN | {"divergence": divergence, "pairs": pairs, "detach_teacher": detach}
    for kind in ("random", "near", "masked", "masked_some"):
        check_loss(make_case(chosen | {"kind": kind}, (6, 3, 67)), ["cuda"])
    check_rows(make_case(chosen | {"dtype": torch.bfloat16}, (3, 5, 300)), ["cuda"])


# Samples come one after another where a team takes several: those that are ignored leave what was
# fetched for them.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ignored", [0.0, 0.5])
@pytest.mark.parametrize("classes", [1100, 1101])
def test_many_samples_of_one_block(on_cuda, ignored, dtype, classes):
    chosen = PLAIN | {"ignored": ignored, "dtype": dtype}
    check_loss(make_case(chosen, (3, 40, classes)), ["cuda"])
    check_rows(make_case(chosen, (3, 40, classes)), ["cuda"])


# Rows that begin one element, or two, further behind a multiple of 16 bytes from sample to sample:
# by every team and home, the first classes of a row and the last read by themselves.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(5, 50, 11), (4, 30, 102), (7, 20, 333), (9, 9, 251), (2, 9, 8203)]
)
@pytest.mark.parametrize(
    "change", [{}, {"divergence": "jsd"}, {"pairs": "matrix", "target": "probabilities"}]
)
def test_rows_that_begin_behind_16_bytes(on_cuda, shape, dtype, change):
    if shape[2] > 8000 and (change or dtype == torch.float64):
        pytest.skip("the sweeps are those of the smaller shapes")
    check_loss(make_case(PLAIN | change | {"dtype": dtype}, shape), ["cuda"])


@pytest.mark.parametrize("classes", [11, 203])
def test_rows_without_any_class_are_predicted_as_torch_does(on_cuda, classes):
    z = [torch.randn(9, classes, generator=generator(k)).bfloat16() for k in range(3)]
    for k, n in ((0, 3), (1, 4), (2, 8)):
        z[k][n] = -math.inf
        z[k][n - 1, 5:7] = math.nan
    found = msdkern.multi_exit_loss(z, pair_weight="mutual").prediction
    assert torch.equal(found, torch.stack([x.float().argmax(-1) for x in z]))


# Offsets of exponents in base 2 are rounded where elements have 2 bytes: it must not show.
@pytest.mark.parametrize("temperature", [1.0, 3.0, 2.7])
@pytest.mark.parametrize(
    ("dtype", "offset", "scale"),
    [
        (torch.bfloat16, 300.0, 1.0), (torch.bfloat16, 0.0, 1e20), (torch.bfloat16, 3e38, 0.0),
        (torch.float16, -6e4, 1.0), (torch.float16, 0.0, 5e3), (torch.float32, 1e6, 1.0),
        (torch.float32, 0.0, 1e20),
    ],
)  # fmt: skip
def test_logits_far_from_zero(on_cuda, dtype, offset, scale, temperature):
    chosen = PLAIN | {"dtype": dtype, "temperature": temperature, "upstream": 1.0}
    for shape in ((3, 4, 64), (4, 3, 1030)):
        case = make_case(chosen, shape)
        given = [(x.double() * scale + offset).to(dtype) for x in case.given]
        check_loss(Case(chosen, shape, Problem(given, case.problem.options), given), ["cuda"])


@pytest.mark.parametrize(("classes", "closer"), [(40, 3.0), (1000, 10.0)])
@pytest.mark.parametrize("pairs", ["mutual", "last", "matrix"])
def test_near_identical_exits(on_cuda, pairs, classes, closer):
    test_loss.test_near_identical_exits_keep_their_digits(pairs, classes, closer, "cuda")


def test_more_labels_than_a_block_counts(on_cuda):
    chosen = PLAIN | {"class_weight": True}
    check_loss(make_case(chosen, (2, 4100, 4)), ["cuda"])


def call(on_device=True, **options):
    """A loss whose numbers are tensors; `on_device`: as a GPU's would be, read by the kernel.

    Each is one that float32 holds exactly: by value they travel as doubles."""
    z = [x.requires_grad_() for x in make_case(PLAIN, (3, 4, 20)).problem.logits]
    numbers = {"temperature": 2.5, "pair_scale": 0.375, "normalizer": 7.0} | options
    out = msdkern.multi_exit_loss(
        z,
        torch.tensor([3, -100, 0, 19]),
        pair_weight="mutual",
        **{k: torch.tensor(v, dtype=torch.float64) for k, v in numbers.items()},
    )
    out.loss.backward()
    return out.loss, [x.grad for x in z]


@pytest.fixture
def numbers_there(on_cuda, monkeypatch):
    real = cuda.reference.accumulation_dtype
    monkeypatch.setattr(
        cuda._Cuda, "number", lambda self, value, dtype: (1.0, value.to(real(dtype)))
    )


def test_numbers_in_device_memory(on_cuda, request):
    expected = call()
    request.getfixturevalue("numbers_there")
    found = call()
    assert torch.equal(expected[0], found[0])
    assert all(torch.equal(a, b) for a, b in zip(expected[1], found[1], strict=True))


def test_a_count_of_no_rows(numbers_there):
    loss, gradients = call(normalizer=0.0)
    assert loss == 0
    assert all((g == 0).all() for g in gradients)


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", 0.0), *itertools.product(("temperature", "normalizer"), (-1.0, math.nan))],
)
def test_numbers_that_cannot_be_make_nan(numbers_there, name, value):
    loss, gradients = call(**{name: value})
    assert loss.isnan()
    assert all(g[0].isnan().all() for g in gradients)


@pytest.mark.parametrize("label", [-1, 20, 1 << 40])
@pytest.mark.parametrize("classes", [20, 300])
def test_a_label_out_of_range(on_cuda, label, classes):
    if label == 20:
        label = classes
    z = [x.requires_grad_() for x in make_case(PLAIN, (3, 4, classes)).problem.logits]
    target = torch.tensor([3, label, -100, 1])
    out = msdkern.multi_exit_loss(z, target, pair_weight="mutual")
    out.loss.backward()
    assert out.loss.isnan()
    for x in z:
        assert x.grad[1].isnan().all()
        assert x.grad[[0, 2, 3]].isfinite().all()
    with pytest.raises(ValueError, match="got one that is out of range on a GPU"):
        cuda.check_labels()
    cuda.check_labels()  # which forgets it
    msdkern.multi_exit_loss(z, target)
    cuda._cuda.workspaces = {key: w[:64].clone() for key, w in cuda._cuda.workspaces.items()}
    msdkern.multi_exit_loss(z, torch.zeros_like(target))  # needs a larger workspace
    with pytest.raises(ValueError, match="got one that is out of range on a GPU"):
        cuda.check_labels()


def test_two_calls_agree_to_the_bit(on_cuda):
    first, second = call(), call()
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


def test_no_rows(on_cuda):
    z = [torch.zeros(0, 5, requires_grad=True) for _ in range(2)]
    out = msdkern.multi_exit_loss(z, torch.zeros(0, dtype=torch.int64), pair_weight="mutual")
    out.loss.backward()
    assert out.loss == 0
    assert z[0].grad.shape == (0, 5)


def test_a_launch_that_fails_says_why(on_cuda, monkeypatch):
    class Broken:
        loss = staticmethod(lambda *a: (cuda.CUDA_ERROR, 0))
        last_error = staticmethod(lambda: "out of memory")
        workspace = on_cuda.workspace

    monkeypatch.setattr(cuda, "_load", lambda: (Broken, None))
    with pytest.raises(RuntimeError, match=r"^multi_exit_loss: CUDA says: out of memory$"):
        msdkern.multi_exit_loss([torch.zeros(1, 2)])


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(("pairs", "classes"), [("mutual", 10), ("matrix", 300), ("next", 1000)])
def test_nan_reaches_what_learns_from_it(on_cuda, pairs, classes, divergence):
    check_that_nan_spreads(pairs, divergence, classes, "cuda")

# SPDX-License-Identifier: Apache-2.0
"""Inputs at the edge of what is legal, each of which once gave a wrong number without a word."""

import pytest
import torch
import torch.nn.functional as F

import msdkern
from tests.cases import DIVERGENCES
from tests.servers import SERVERS, serve

EXITS, ROWS, CLASSES = 3, 4, 10


def exits(rows=ROWS, **options):
    g = torch.Generator(torch.get_default_device()).manual_seed(0)
    return [
        torch.randn(rows, CLASSES, generator=g, **options).requires_grad_() for _ in range(EXITS)
    ]


@pytest.mark.host
@pytest.mark.parametrize("name", ["temperature", "pair_scale", "normalizer"])
def test_a_scalar_on_another_device_is_refused(name):
    sentence = f"{name} must be on the CPU or on the device of the logits \\(cpu\\); got 'meta'"
    with pytest.raises(ValueError, match=sentence):
        msdkern.multi_exit_loss(exits(), **{name: torch.tensor(2.0, device="meta")})


@pytest.mark.parametrize("server", SERVERS)
def test_arguments_changed_in_place_before_backward_are_noticed(server):
    z, t = exits(), torch.tensor(2.0)
    with serve(server):
        row = msdkern.multi_exit_row_losses(z, pair_weight="mutual", temperature=t)
        t.fill_(4.0)
        with pytest.raises(RuntimeError, match="an argument was changed in place"):
            row.divergence.sum().backward()
        weight = torch.ones(EXITS)
        target = torch.zeros(ROWS, dtype=torch.int64)
        loss = msdkern.multi_exit_loss(z, target, exit_weight=weight).loss
        loss.backward(retain_graph=True)
        target.fill_(4)
        with pytest.raises(RuntimeError, match="an argument was changed in place"):
            loss.backward()
        p = msdkern.multi_exit_softmax(z, temperature=t)
        t.fill_(1.0)
        with pytest.raises(RuntimeError, match="an argument was changed in place"):
            p[0].sum().backward()


def test_forward_mode_differentiation_is_refused():
    def loss(x):
        return msdkern.multi_exit_loss([x, 0.5 * x], pair_weight="mutual").loss

    x = torch.randn(2, 5)
    with pytest.raises(RuntimeError):
        torch.func.jvp(loss, (x,), (torch.ones_like(x),))


@pytest.mark.parametrize("beta", [0.3, 1e-9, 1 - 1e-9])
@pytest.mark.parametrize("server", SERVERS)
def test_jsd_of_almost_disjoint_exits_is_finite(server, beta):
    z = torch.zeros(2, 1, 64)
    z[0, 0, 0], z[1, 0, 0], z[1, 0, 1] = -86.0, 5.0, -torch.inf
    z.requires_grad_()
    options = {"pair_weight": "mutual", "divergence": "jsd", "beta": beta}
    with serve(server):
        out = msdkern.multi_exit_loss(z, **options)
        out.loss.backward()
    with msdkern.executor("eager"):
        truth = msdkern.multi_exit_loss(z.detach().double(), **options).loss
    assert torch.isfinite(z.grad).all()
    torch.testing.assert_close(out.loss.detach().double(), truth, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("pairs", ["next", "matrix"])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("server", SERVERS)
def test_an_exit_far_away_does_not_blur_the_others(server, divergence, pairs):
    g = torch.Generator(torch.get_default_device()).manual_seed(1)
    first = torch.randn(8, 100, generator=g)
    z = [first, first + 1e-4 * torch.randn(8, 100, generator=g), 1000.0 * first.flip(1)]
    weight = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    weight = "next" if pairs == "next" else weight
    with serve(server):
        ours = msdkern.multi_exit_row_losses(z, pair_weight=weight, divergence=divergence)
    with msdkern.executor("eager"):
        truth = msdkern.multi_exit_row_losses(
            [x.double() for x in z], pair_weight="next", divergence=divergence
        )
    logs = [F.log_softmax(x, -1) for x in z[:2]]
    student, teacher = logs if divergence == "forward_kl" else reversed(logs)
    plain = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
    errors = [(x - truth.divergence[0]).abs().max() for x in (ours.divergence[0], plain)]
    assert errors[0] <= errors[1], errors


@pytest.mark.parametrize("server", SERVERS)
def test_a_teacher_without_weight_may_hold_nan(server):
    z = exits()
    bad = torch.full((ROWS, CLASSES), torch.nan)
    weight = torch.cat([msdkern.pairs.mutual(EXITS), torch.zeros(EXITS, 1)], dim=1)
    with serve(server):
        out = msdkern.multi_exit_loss(z, pair_weight=weight, teacher_logits=[bad])
        out.loss.backward()
    assert torch.isfinite(out.loss)
    assert all(torch.isfinite(x.grad).all() for x in z)


def check_that_nan_spreads(pairs, divergence, classes, server):
    """NaN in the deepest exit's row 1: NaN in the gradients of that row of whoever learns from it,
    and nowhere else."""
    z = [torch.randn(ROWS, classes) for _ in range(4)]
    z[3][1, 5] = torch.nan
    z = [x.requires_grad_() for x in z]
    weight = msdkern.pairs.next(4) if pairs == "matrix" else pairs
    with serve(server):
        out = msdkern.multi_exit_loss(
            z, torch.arange(ROWS), pair_weight=weight, divergence=divergence
        )
        out.loss.backward()
    learns = 0 if pairs == "mutual" else 2
    expected = [[k >= learns and row == 1 for row in range(ROWS)] for k in range(4)]
    assert out.loss.isnan()
    assert [x.grad.isnan().all(-1).tolist() for x in z] == expected
    assert [x.grad.isnan().any(-1).tolist() for x in z] == expected


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("classes", [10, 300])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("pairs", ["mutual", "next", "matrix"])
def test_nan_reaches_what_learns_from_it(pairs, divergence, classes, server):
    check_that_nan_spreads(pairs, divergence, classes, server)


@pytest.mark.parametrize("server", SERVERS)
def test_rows_of_infinite_divergence_can_be_left_out(server):
    a, b = torch.randn(2, 5), torch.randn(2, 5)
    b[0, 2] = -torch.inf
    z = [a.requires_grad_(), b.requires_grad_()]
    with serve(server):
        row = msdkern.multi_exit_row_losses(z, pair_weight="mutual", divergence="reverse_kl")
        torch.where(row.divergence.isfinite(), row.divergence, 0.0).sum().backward()
    assert torch.isfinite(a.grad).all()
    assert torch.isfinite(b.grad).all()


@pytest.mark.parametrize("server", SERVERS)
def test_log_sums_of_infinite_rows(server):
    rows = torch.tensor([[torch.inf, 0.0, 1.0], [-torch.inf] * 3, [torch.nan, 0.0, 0.0]])
    with serve(server):
        lse = msdkern.exit_statistics([rows]).lse[0]
    torch.testing.assert_close(lse, torch.logsumexp(rows, -1), equal_nan=True)


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("classes", [5, 100, 600])
def test_predictions_of_rows_whose_softmax_is_not_finite(classes, server):
    """As torch.argmax: an infinite logit, the first NaN, nothing but -inf."""
    z = torch.zeros(4, classes)
    z[0, 3] = torch.inf
    z[1, 1], z[1, 2], z[1, 4] = torch.inf, torch.nan, torch.nan
    z[2] = -torch.inf
    with serve(server):
        out = msdkern.multi_exit_loss([z, z.flip(0)], torch.zeros(4, dtype=torch.int64))
        statistics = msdkern.exit_statistics([z])
    assert out.prediction.tolist() == [z.argmax(1).tolist(), z.flip(0).argmax(1).tolist()]
    assert statistics.prediction[0].tolist() == z.argmax(1).tolist()


@pytest.mark.parametrize("classes", [5000, 1_200_000])
def test_rows_of_many_classes_that_are_not_finite(classes):
    """On the CPU, where a row of the larger size is read once, piece by piece."""
    z = torch.zeros(6, classes)
    z[0, :4097] = -torch.inf  # its first piece
    z[1, classes - 1], z[2] = torch.inf, -torch.inf
    z[3, 2], z[4, :4096], z[5, 0] = torch.nan, torch.nan, -torch.inf
    z[5, classes - 2] = 3.0
    with serve("cpu"):
        out = msdkern.multi_exit_loss([z, z + 0.0], torch.ones(6, dtype=torch.int64))
    truth = torch.softmax(z.double(), -1).max(-1)
    assert out.prediction[1].tolist() == z.argmax(1).tolist()
    torch.testing.assert_close(out.confidence[1].double(), truth.values, equal_nan=True)


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("classes", [10, 300])
def test_columns_may_lie_apart(classes, server):
    """Copies that kernels get by address must outlive the call, teachers' as well."""
    make = torch.Generator(torch.get_default_device()).manual_seed(0)
    columns = [torch.randn(classes, 64, generator=make) for _ in range(5)]
    weight = torch.rand(3, 5, generator=make)

    def answers(rows):
        z = [t.requires_grad_() for t in rows[:3]]
        options = {"pair_weight": weight, "teacher_logits": rows[3:], "temperature": 2.0}
        out = msdkern.multi_exit_loss(z, **options)
        row = msdkern.multi_exit_row_losses(z, **options)
        (out.loss + row.divergence.square().sum()).backward()
        return [out.loss, row.divergence, *(t.grad for t in z)]

    with serve(server):
        apart = answers([t.clone().t() for t in columns])
        dense = answers([t.t().contiguous() for t in columns])
    assert all(torch.equal(a, b) for a, b in zip(apart, dense, strict=True))


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("classes", [10, 300])
def test_pairs_that_the_deepest_exit_has_no_part_in(classes, server):
    z = [torch.randn(4, classes) for _ in range(3)]
    weight = torch.zeros(3, 3)
    weight[0, 1] = 1.0
    with serve(server):
        expected = msdkern.multi_exit_row_losses(z, pair_weight=weight).divergence[0]
        for bad in (torch.nan, -torch.inf):
            z[2] = torch.full((4, classes), bad)
            row = msdkern.multi_exit_row_losses(z, pair_weight=weight)
            torch.testing.assert_close(row.divergence[0], expected)


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("classes", [10, 300])
def test_a_masked_label_without_weight(classes, server):
    """0 times infinity, as F.cross_entropy has it."""
    z, target, weight = torch.randn(20, classes), torch.arange(20) % 10, torch.ones(classes)
    weight[3], z[3, 3] = 0.0, -torch.inf
    expected = F.cross_entropy(z, target, weight, reduction="none")
    with serve(server):
        row = msdkern.multi_exit_row_losses([z], target, class_weight=weight)
    torch.testing.assert_close(row.cross_entropy[0], expected, equal_nan=True)


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("mask", [torch.finfo(torch.float32).min, -1e38])
def test_entropy_of_rows_masked_by_a_low_number(mask, server):
    z = torch.full((3, 5000), mask)
    z[0, :100], z[1, 4000:], z[2, 2000] = torch.randn(100), torch.randn(1000), 1.0
    with serve(server):
        score = msdkern.gate_step(z, 0.0, "entropy").score
        entropy = msdkern.exit_statistics([z]).entropy[0]
    p = torch.softmax(z.double(), -1)
    expected = -torch.special.xlogy(p, p).sum(-1).float()
    torch.testing.assert_close(score, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(entropy, expected, rtol=1e-5, atol=1e-6)

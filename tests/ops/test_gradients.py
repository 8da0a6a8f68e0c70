# SPDX-License-Identifier: Apache-2.0
"""What autograd may rely on: who gets a gradient, when it is recomputed, what is refused."""

import pytest
import torch
import torch.nn.functional as F

import msdkern
from tests import oracle
from tests.cases import generator, make_logits
from tests.servers import SERVERS, serve

SHAPE = (4, 6, 5)


@pytest.fixture(params=SERVERS)
def server(request):
    with serve(request.param):
        yield request.param


@pytest.fixture
def logits():
    return [z.requires_grad_() for z in make_logits("random", SHAPE, torch.float64, 3)]


@pytest.fixture
def target():
    return torch.randint(SHAPE[2], (SHAPE[1],), generator=generator(1))


def loss_of(z, target, **options):
    return msdkern.multi_exit_loss(z, target, pair_weight="mutual", temperature=2.0, **options).loss


def exact_gradients(z, target, **options):
    problem = oracle.Problem(
        [x.detach() for x in z],
        {"target": target, "pair_weight": "mutual", "temperature": 2.0, **options},
    )
    true = oracle.truth(problem)
    return oracle.gradients(true, [true["loss"]], [torch.ones(())])


FORMS = {
    "loss": lambda z, y, **o: msdkern.multi_exit_loss(z, y, **o).loss,
    "rows": lambda z, y, **o: sum(x.sum() for x in msdkern.multi_exit_row_losses(z, y, **o)),
}


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "soft_ce"])
@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form, divergence, server, logits, target):
    weight = torch.rand(4, 5, generator=generator(2))
    teacher = make_logits("random", (1, *SHAPE[1:]), torch.float64, 9)
    target[0] = -100
    # Finite differences see teachers as well, so the true mutual gradient is what they confirm.
    options = {"pair_weight": weight, "teacher_logits": teacher, "temperature": 1.7, "beta": 0.3}
    options |= {"detach_teacher": False, "divergence": divergence, "label_smoothing": 0.1}
    call = lambda *z: FORMS[form](list(z), target, **options)  # noqa: E731
    assert torch.autograd.gradcheck(call, logits, fast_mode=False)


@pytest.mark.parametrize("log", [False, True])
def test_gradcheck_of_softmax(log, server, logits):
    call = lambda *z: msdkern.multi_exit_softmax(list(z), 1.7, log=log)  # noqa: E731
    assert torch.autograd.gradcheck(call, logits[:2])


def test_gradcheck_of_stacked_logits(server, target):
    z = torch.stack(make_logits("random", SHAPE, torch.float64)).requires_grad_()
    options = {"pair_weight": "mutual", "detach_teacher": False}
    assert torch.autograd.gradcheck(lambda z: FORMS["loss"](z, target, **options), z)
    assert torch.autograd.gradcheck(lambda z: FORMS["rows"](z, target, **options), z)


@pytest.mark.parametrize("exits", [1, 2])
def test_stacked_logits_get_a_gradient_of_their_own_shape(exits, server, target):
    z = torch.stack(make_logits("random", (exits, 6, 5), torch.float32)).requires_grad_()
    for form in FORMS.values():
        (gradient,) = torch.autograd.grad(form(z, target), z)
        assert gradient.shape == z.shape


@pytest.mark.parametrize("factor", [1.0, -2.5, 0.0])
def test_upstream_gradient_scales(factor, server, logits, target):
    found = torch.autograd.grad(loss_of(logits, target) * factor, logits)
    for ours, exact in zip(found, exact_gradients(logits, target), strict=True):
        torch.testing.assert_close(ours, exact * factor)


def test_a_second_backward_recomputes_and_leaves_the_first_alone(server, logits, target):
    loss = loss_of(logits, target)
    exact = exact_gradients(logits, target)
    factors = (1.0, -3.0, 0.5, 1.0)
    handed_out = [
        torch.autograd.grad(loss, logits, torch.tensor(f, dtype=loss.dtype), retain_graph=True)
        for f in factors
    ]
    for factor, found in zip(factors, handed_out, strict=True):
        for ours, truth in zip(found, exact, strict=True):
            torch.testing.assert_close(ours, truth * factor)
    addresses = {g.data_ptr() for found in handed_out for g in found}
    assert len(addresses) == len(factors) * len(logits)


def test_gradients_accumulate_over_two_losses(server, logits, target):
    (loss_of(logits, target) + 2.0 * loss_of(logits, target)).backward()
    for z, exact in zip(logits, exact_gradients(logits, target), strict=True):
        torch.testing.assert_close(z.grad, 3.0 * exact)


@pytest.mark.parametrize("form", FORMS)
def test_logits_changed_in_place_before_backward_are_detected(form, server, logits, target):
    loss = FORMS[form](logits, target, pair_weight="mutual")
    torch.autograd.grad(loss, logits, retain_graph=True)
    with torch.no_grad():
        logits[1].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, logits)


@pytest.mark.parametrize("form", FORMS)
def test_only_exits_that_require_grad_get_one(form, server, logits, target):
    wanting = (0, 2)
    mixed = [z if k in wanting else z.detach() for k, z in enumerate(logits)]
    FORMS[form](mixed, target, pair_weight="mutual", temperature=2.0).backward()
    exact = exact_gradients(logits, target, reduction="mean" if form == "loss" else "sum")
    for k, z in enumerate(mixed):
        if k in wanting:
            torch.testing.assert_close(z.grad, exact[k])
        else:
            assert z.grad is None


def test_only_the_loss_is_differentiable(server, logits, target):
    out = msdkern.multi_exit_loss(logits, target, pair_weight="mutual", pair_divergence=True)
    assert out.loss.requires_grad
    assert not any(value.requires_grad for value in out[1:])


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_grad_nothing_requires_grad(context, server, logits, target):
    with context():
        out = msdkern.multi_exit_loss(logits, target, pair_weight="mutual")
        rows = msdkern.multi_exit_row_losses(logits, target, pair_weight="mutual")
        soft = msdkern.multi_exit_softmax(logits)
    assert not any(v.requires_grad for v in (*out[:3], *rows, *soft))
    torch.testing.assert_close(out.loss, loss_at_one(logits, target))


def loss_at_one(logits, target):
    return msdkern.multi_exit_loss(logits, target, pair_weight="mutual").loss.detach()


DIFFERENTIABLE = {
    "multi_exit_loss": FORMS["loss"],
    "multi_exit_row_losses": FORMS["rows"],
    "multi_exit_softmax": lambda z, y: sum(p.square().sum() for p in msdkern.multi_exit_softmax(z)),
}


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_second_order_gradients_are_refused(op, server, logits, target):
    sentence = f"{op}: second-order gradients are not implemented; got create_graph=True"
    with pytest.raises(RuntimeError) as caught:
        torch.autograd.grad(DIFFERENTIABLE[op](logits, target), logits, create_graph=True)
    assert str(caught.value) == sentence
    with pytest.raises(RuntimeError, match="second-order"):
        torch.autograd.gradgradcheck(lambda *z: DIFFERENTIABLE[op](list(z), target), logits)


BAD = {"nan": torch.nan, "inf": torch.inf, "minus inf": -torch.inf}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {"pair_weight": "mutual"},
        {"pair_weight": "deeper", "divergence": "jsd", "detach_teacher": False},
        {"label_smoothing": 0.1},
        {"pair_weight": "last", "pair_divergence": True},
    ],
    ids=str,
)
def test_ignored_rows_add_exactly_nothing(options, dtype, bad, server, target):
    """(4) Even where their logits are not numbers."""
    z = make_logits("random", SHAPE, dtype, 5)
    clean = [x.clone().requires_grad_() for x in z]
    spoilt = [x.index_fill(0, torch.tensor([1, 4]), BAD[bad]).requires_grad_() for x in z]
    target[1] = target[4] = -100
    results = [msdkern.multi_exit_loss(x, target, **options) for x in (clean, spoilt)]
    for out in results:
        out.loss.backward()
    for a, b in zip(results[0][:4], results[1][:4], strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    for a, b in zip(clean, spoilt, strict=True):
        assert torch.equal(a.grad, b.grad)
        assert not b.grad[[1, 4]].any()
    rows = {k: v for k, v in options.items() if k != "pair_divergence"}
    for term in msdkern.multi_exit_row_losses(spoilt, target, **rows):
        assert torch.equal(term[:, [1, 4]], torch.zeros(4, 2))
        assert term.isfinite().all()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("weighted", [False, True])
def test_all_rows_ignored(weighted, reduction, server):
    z = [x.requires_grad_() for x in make_logits("random", SHAPE, torch.float32)]
    out = msdkern.multi_exit_loss(
        z, torch.full((6,), -100), pair_weight="mutual", reduction=reduction,
        class_weight=torch.ones(5) if weighted else None, pair_divergence=True,
    )  # fmt: skip
    out.loss.backward()
    for value in (*out[:4], *(x.grad for x in z)):
        assert not value.any(), "an empty mean is 0, never NaN"


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("kind", ["index", "probabilities"])
def test_class_weights_as_in_cross_entropy(kind, smoothing, reduction, server, logits, target):
    weight = torch.rand(5, generator=generator(3), dtype=torch.float64) + 0.1
    if kind == "index":
        target[2] = -100
    else:
        target = torch.rand(6, 5, generator=generator(4), dtype=torch.float64)
    options = {"label_smoothing": smoothing, "reduction": reduction}
    expected = sum(F.cross_entropy(z, target, weight, **options) for z in logits)
    exact = torch.autograd.grad(expected, logits)
    loss = msdkern.multi_exit_loss(logits, target, class_weight=weight, **options).loss
    torch.testing.assert_close(loss, expected)
    for ours, truth in zip(torch.autograd.grad(loss, logits), exact, strict=True):
        torch.testing.assert_close(ours, truth)


def test_a_class_without_weight_or_mass_may_be_masked(server):
    """0 log 0 = 0 also for targets: probability 0 on a class at -inf adds nothing."""
    z = torch.tensor([[0.3, -torch.inf, 1.0]], requires_grad=True)
    target = torch.tensor([[0.25, 0.0, 0.75]])
    loss = msdkern.multi_exit_loss([z], target).loss
    loss.backward()
    two = z.detach()[:, [0, 2]].requires_grad_()
    F.cross_entropy(two, target[:, [0, 2]]).backward()
    torch.testing.assert_close(loss.detach(), F.cross_entropy(two, target[:, [0, 2]]).detach())
    torch.testing.assert_close(z.grad[:, [0, 2]], two.grad)
    assert z.grad[0, 1] == 0


@pytest.mark.parametrize("normalizer", [7, 7.0, "tensor", "integer tensor"])
def test_normalizer_overrides_reduction_and_weights(normalizer, server, logits, target):
    tensors = {"tensor": torch.tensor(7.0), "integer tensor": torch.tensor(7)}
    normalizer = tensors.get(normalizer, normalizer)
    weight = torch.rand(5, generator=generator(3)) + 0.1
    options = {"pair_weight": "mutual", "class_weight": weight}
    whole = msdkern.multi_exit_loss(logits, target, reduction="sum", **options).loss
    for reduction in ("mean", "sum"):
        loss = msdkern.multi_exit_loss(
            logits, target, reduction=reduction, normalizer=normalizer, **options
        ).loss
        torch.testing.assert_close(loss, whole / 7.0)
        found = torch.autograd.grad(loss, logits)
        expected = torch.autograd.grad(whole / 7.0, logits, retain_graph=True)
        for ours, truth in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, truth)


@pytest.mark.parametrize("normalizer", [0, 0.0, torch.tensor(0), torch.tensor(0.0)])
def test_a_count_of_no_rows_gives_zero(normalizer, server, logits, target):
    """And does not mean "none given"."""
    for labels in (target, torch.full_like(target, -100)):
        loss = msdkern.multi_exit_loss(
            logits, labels, pair_weight="mutual", normalizer=normalizer
        ).loss
        assert loss.item() == 0
        for gradient in torch.autograd.grad(loss, logits):
            assert not gradient.any()


def test_loss_scaling_of_half_precision(server, target):
    """A loss scale arrives upstream, in float32: what half precision cannot hold before it is
    applied must not be lost."""
    g = generator(8)
    z = [(2 * torch.randn(512, 64, generator=g)).half().requires_grad_() for _ in range(2)]
    y = torch.randint(64, (512,), generator=g)
    scale = 2.0**14
    (msdkern.multi_exit_loss(z, y).loss * scale).backward()
    plain = [x.detach().clone().requires_grad_() for x in z]
    (sum(F.cross_entropy(x.float(), y) for x in plain) * scale).backward()
    for ours, theirs in zip(z, plain, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=3e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({"pair_weight": "mutual"}, (3, 149, 149)),
        ({"pair_weight": "last"}, (2, 149, 149)),
        ({"pair_weight": "deeper", "divergence": "reverse_kl"}, (3, 149, 149)),
        ({"pair_weight": "next", "divergence": "jsd"}, (3, 149, 149)),
        ({"pair_weight": "mutual", "label_smoothing": 0.1}, (3, 149, 149)),
        ({}, (2, 149, 149)),
        ({"pair_weight": "mutual"}, (3, 11, 11)),
        ({"pair_weight": "last"}, (2, 3, 62003)),
        ({"pair_weight": "mutual", "kind": "masked_some"}, (3, 149, 149)),
        ({"pair_weight": "deeper", "divergence": "soft_ce", "detach_teacher": False}, (9, 33, 149)),
    ],
    ids=str,
)
def test_gradients_of_half_precision_are_rounded_once(server, options, shape, dtype):
    """They are those of the same logits in float32, rounded to nearest even: the label's share,
    too, with labels in every place of a vector, is subtracted before."""
    options = {"temperature": 2.0, "reduction": "sum", **options}
    z = make_logits(options.pop("kind", "random"), shape, dtype, 5)
    y = torch.arange(shape[1]) * ((shape[2] - 1) // max(1, shape[1] - 1)) % shape[2]
    y[1] = -100
    narrow = [x.detach().clone().requires_grad_() for x in z]
    wide = [x.float().requires_grad_() for x in z]
    for x in (narrow, wide):
        msdkern.multi_exit_loss(x, y, **options).loss.backward()
    for ours, exact in zip(narrow, wide, strict=True):
        # Exponentials of a long row are summed in another order, so that float32 itself is off by
        # 2^-20 of these terms; a share that is subtracted from what is rounded, by up to 2^-9.
        terms = exact.grad.abs() + exact.softmax(1) + (exact / options["temperature"]).softmax(1)
        slack = terms.detach() * 2.0**-19
        assert (ours.grad >= (exact.grad - slack).to(dtype)).all()
        assert (ours.grad <= (exact.grad + slack).to(dtype)).all()


def test_a_second_thread(server, logits, target):
    import threading

    expected = loss_of(logits, target).item()
    results = []

    def work():
        z = [x.detach().requires_grad_() for x in logits]
        loss = loss_of(z, target)
        loss.backward()
        results.append((loss.item(), z[0].grad))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert [value for value, _ in results] == [expected] * 3
    assert all(torch.equal(results[0][1], g) for _, g in results)

# SPDX-License-Identifier: Apache-2.0
"""The registered ops as PyTorch's tools see them: opcheck, FakeTensor, meta, export."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import msdkern
from msdkern.ops import library
from tests.cases import generator, make_logits
from tests.servers import SERVERS, serve

SHAPE = (3, 4, 5)
NAMES = [server.partition(":")[0] for server in SERVERS]
EXECUTORS = sorted(set(NAMES))


def loss_inputs(dtype=torch.float32, stacked=False):
    """Arguments in the order of the schema, less what only one op takes."""
    z = make_logits("random", SHAPE, dtype)
    y = torch.randint(SHAPE[2], (SHAPE[1],), generator=generator(0))
    real = torch.float64 if dtype == torch.float64 else torch.float32
    weight = torch.rand(3, 4, generator=generator(1), dtype=real)
    teacher = make_logits("random", (1, *SHAPE[1:]), dtype, 4)
    z = [torch.stack(z)] if stacked else z
    scalars = (torch.tensor(1.5, dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64))
    return (
        z, teacher, y, None, "dense", weight, *scalars, True, "forward_kl", 0.5, True, None, -100,
        0.0,
    )  # fmt: skip


def samples(executor, stacked, dtype):
    rows = loss_inputs(dtype, stacked)
    z, flags = rows[0], [True] * len(rows[0])
    real = torch.float64 if dtype == torch.float64 else torch.float32
    upstream = [torch.ones(SHAPE[:2], dtype=real)] * 2
    t = torch.tensor(2.0, dtype=torch.float64)
    p = [torch.softmax(x, -1) for x in z]
    yield "multi_exit_loss", (*rows, "mean", None, True, flags, executor)
    yield "multi_exit_loss", (*rows, "sum", torch.tensor(3.0), False, [], executor)
    yield "multi_exit_row_losses", (*rows, executor)
    yield "multi_exit_row_losses_backward", (*upstream, *rows, flags, executor)
    yield "multi_exit_softmax", (z, t, False, executor)
    yield "multi_exit_softmax_backward", (p, p, t, False, executor)
    yield "exit_statistics", (z, executor)
    yield from gate_samples(z, executor)
    yield "scale_", ([x.clone() for x in z], torch.tensor(2.0), executor)


def gate_samples(z, executor):
    x, t = z[0] if z[0].dim() == 2 else z[0][0], torch.tensor(2.0, dtype=torch.float64)
    limits = torch.tensor([0.3, 0.4, 0.5])
    score, count = torch.rand(SHAPE[:2], generator=generator(2)), torch.tensor(2)
    score = score.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    prediction, stay = torch.zeros(SHAPE[1], dtype=torch.int64), torch.tensor([2, 0, 1, 3])
    yield "exit_gate", (z, limits, "entropy", t, None, executor)
    yield "exit_gate", (z, t, "score", limits, score, executor)
    yield "gate_step", (x, t, "margin", t, None, None, None, None, executor)
    live = torch.tensor(SHAPE[1])  # opcheck takes NaN, the score of rows past it, for a difference
    yield "gate_step", (x, t, "patience", t, None, prediction, score[0], live, executor)
    yield "compact_rows", ([x, prediction], stay, count, 4, executor)
    yield "compact_rows", ([x], stay, None, 2, executor)
    yield "scatter_rows", ([x.clone(), prediction], [x, prediction], stay, count, executor)
    yield "scatter_rows", ([x.clone()], [x[:2].contiguous()], stay, None, executor)


def test_every_registered_op_is_sampled():
    assert {name for name, _ in samples("eager", False, torch.float32)} == set(library.SCHEMAS)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize(
    ("dtype", "stacked"), [(torch.float32, True), (torch.bfloat16, False), (torch.float64, False)]
)
def test_opcheck(dtype, stacked, executor):
    for name, arguments in samples(executor, stacked, dtype):
        torch.library.opcheck(getattr(torch.ops.msdkern, name).default, arguments)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_fakes_agree_with_results(executor):
    """Shapes, dtypes and strides, for a partial wish for gradients too."""
    rows = loss_inputs()
    arguments = (*rows, "mean", None, True, [True, False, True], executor)
    real = torch.ops.msdkern.multi_exit_loss.default(*arguments)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = torch.ops.msdkern.multi_exit_loss.default(*arguments)
    assert len(real[-1]) == len(fake[-1]) == 2
    for a, b in zip((*real[:-1], *real[-1]), (*fake[:-1], *fake[-1]), strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
        assert isinstance(b, FakeTensor)


@pytest.mark.parametrize("stacked", [False, True])
def test_meta_tensors(stacked):
    """Shapes without memory: the forward and backward of a model on the meta device."""
    z = torch.randn(3, 4, 5, device="meta", requires_grad=True)
    given = z if stacked else list(z.unbind(0))
    y = torch.zeros(4, dtype=torch.int64, device="meta")
    out = msdkern.multi_exit_loss(given, y, pair_weight="mutual", pair_divergence=True)
    assert out.loss.shape == ()
    assert out.loss.device.type == "meta"
    assert out.pair_divergence.shape == (3, 3)
    assert out.prediction.dtype == torch.int64
    out.loss.backward()
    assert z.grad.shape == z.shape
    rows = msdkern.multi_exit_row_losses(given, y, pair_weight="mutual")
    assert rows.divergence.shape == (3, 4)
    rows.divergence.sum().backward()
    assert msdkern.exit_statistics(given).margin.shape == (3, 4)
    assert [x.shape for x in msdkern.exit_gate(given, 0.5)] == [(4,)] * 3
    step = msdkern.gate_step(z.detach()[0], 0.5)
    assert [x.shape for x in step] == [(4,), (4,), (4,), ()]
    assert msdkern.compact_rows(z.detach()[0], step.stay, step.count).shape == (4, 5)
    assert [p.shape for p in msdkern.multi_exit_softmax(given, 2.0)] == [(4, 5)] * 3


def test_fake_tensors_through_the_public_functions():
    with FakeTensorMode():
        z = [torch.randn(4, 5, requires_grad=True) for _ in range(3)]
        y = torch.zeros(4, dtype=torch.int64)
        out = msdkern.multi_exit_loss(z, y, pair_weight="deeper", temperature=3.0)
        assert isinstance(out.loss, FakeTensor)
        out.loss.backward()
        assert z[0].grad.shape == (4, 5)
        assert isinstance(msdkern.exit_statistics(z).lse, FakeTensor)


class Gate(torch.nn.Module):
    def forward(self, a, b):
        return msdkern.exit_statistics([a, b]).confidence


def test_export_of_a_gate():
    a, b = make_logits("random", (2, 4, 5), torch.float32)
    program = torch.export.export(Gate(), (a, b), strict=False)
    assert "msdkern.exit_statistics" in program.graph_module.code
    torch.testing.assert_close(program.module()(a, b), Gate()(a, b))


def test_an_exported_gate_decomposes_into_plain_pytorch():
    """A program for a runtime that knows no msdkern: reference.statistics in place of the op."""
    from msdkern import reference

    def decomposed(logits, executor):
        return tuple(torch.stack(v) for v in zip(*(map(reference.statistics, logits)), strict=True))

    a, b = make_logits("random", (2, 4, 5), torch.float32)
    program = torch.export.export(Gate(), (a, b), strict=False)
    table = torch.export.default_decompositions()
    table[torch.ops.msdkern.exit_statistics.default] = decomposed
    plain = program.run_decompositions(table)
    assert "msdkern" not in plain.graph_module.code
    torch.testing.assert_close(plain.module()(a, b), Gate()(a, b))


@pytest.mark.host
@pytest.mark.parametrize("server", SERVERS)
def test_autocast(server):
    """Whatever the autocast dtype, logits are taken in the dtype they have."""
    with serve(server):
        x = torch.randn(6, 8, generator=generator(0))
        layers = [torch.nn.Linear(8, 5) for _ in range(3)]
        y = torch.zeros(6, dtype=torch.int64)
        with torch.autocast("cpu", torch.bfloat16):
            z = [layer(x) for layer in layers]
            loss = msdkern.multi_exit_loss(z, y, pair_weight="mutual").loss
            rows = msdkern.multi_exit_row_losses([t.detach() for t in z], y, pair_weight="mutual")
        assert z[0].dtype == torch.bfloat16
        assert loss.dtype == torch.float32
        loss.backward()
        outside = msdkern.multi_exit_loss([t.detach() for t in z], y, pair_weight="mutual").loss
        assert torch.equal(loss.detach(), outside)
        whole = rows.cross_entropy.mean(1).sum() + rows.divergence.mean(1).sum()
        torch.testing.assert_close(whole, outside)
        assert all(layer.weight.grad.any() for layer in layers)

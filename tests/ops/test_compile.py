# SPDX-License-Identifier: Apache-2.0
"""Under torch.compile(fullgraph=True): the same results, and no new graph for a new temperature."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import msdkern
from tests.cases import generator, make_logits
from tests.servers import FASTEST, SERVERS, serve

SERVED = ("eager",) if SERVERS[0] == FASTEST else ("eager", FASTEST)


@pytest.fixture(params=SERVED)
def server(request):
    torch._dynamo.reset()
    with serve(request.param):
        yield request.param
    torch._dynamo.reset()


def problem(exits=3, dtype=torch.float32, seed=0):
    z = make_logits("random", (exits, 6, 5), dtype, seed)
    y = torch.randint(5, (6,), generator=generator(seed))
    return [x.requires_grad_() for x in z], y


def loss(z, y, t, w):
    out = msdkern.multi_exit_loss(z, y, pair_weight=w, temperature=t, pair_divergence=True)
    return out.loss * 2.0 + 0.0 * out.cross_entropy.sum()


def rows(z, y, t, w):
    out = msdkern.multi_exit_row_losses(z, y, pair_weight=w, temperature=t)
    return (out.cross_entropy * 0.5 + out.divergence).mean()


def softmax(z, y, t, w):
    return sum(p.square().sum() for p in msdkern.multi_exit_softmax(z, t))


def statistics(z, y, t, w):
    s = msdkern.exit_statistics(z)
    return sum(x.square().mean() for x in z) + s.entropy.sum() + s.prediction.sum()


PROGRAMS = {"loss": loss, "rows": rows, "softmax": softmax, "statistics": statistics}


def compare(program, compiled, z, *arguments):
    expected = program(z, *arguments)
    gradients = torch.autograd.grad(expected, z)
    found = compiled(z, *arguments)
    torch.testing.assert_close(found, expected)
    for ours, truth in zip(torch.autograd.grad(found, z), gradients, strict=True):
        torch.testing.assert_close(ours, truth)


@pytest.mark.parametrize("name", PROGRAMS)
def test_full_graph_forward_and_backward(name, server):
    z, y = problem()
    compiled = torch.compile(PROGRAMS[name], fullgraph=True, backend="aot_eager")
    for w in ("mutual", torch.rand(3, 3, generator=generator(2))):
        compare(PROGRAMS[name], compiled, z, y, 2.0, w)


def test_inductor(server):
    z, y = problem()
    compiled = torch.compile(loss, fullgraph=True, backend="inductor")
    compare(loss, compiled, z, y, torch.tensor(2.0), "mutual")


@pytest.mark.parametrize("kind", ["float", "tensor"])
def test_a_new_temperature_or_weight_recompiles_at_most_once(kind, server):
    """Once, when PyTorch learns that a number is not a constant; a tensor never."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for step in range(6):
        z, y = problem(seed=step)
        t, w = 1.0 + 0.37 * step, torch.rand(3, 3, generator=generator(step))
        compare(loss, compiled, z, y, torch.tensor(t) if kind == "tensor" else t, w)
    assert counter.frame_count <= (1 if kind == "tensor" else 2)


def test_a_temperature_below_a_layer_of_the_model(server):
    """The temperature is an attribute that a schedule changes between steps."""
    counter = CompileCounterWithBackend("aot_eager")

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.temperature = 1.0
            self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 5) for _ in range(3))

        def forward(self, x, y):
            z = [layer(x) for layer in self.layers]
            return loss(z, y, self.temperature, "mutual")

    model = Model()
    step = torch.compile(model, fullgraph=True, backend=counter)
    x, y = torch.randn(6, 4, generator=generator(0)), torch.zeros(6, dtype=torch.int64)
    for t in (1.0, 1.5, 2.0, 2.5, 3.0):
        model.temperature = t
        found = step(x, y)
        found.backward()
        torch.testing.assert_close(found, model(x, y))
    assert counter.frame_count <= 2


def test_only_some_exits_require_grad(server):
    z, y = problem()
    mixed = [z[0], z[1].detach(), z[2]]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(mixed, y, 2.0, "mutual"), [z[0], z[2]])
    expected = torch.autograd.grad(loss(mixed, y, 2.0, "mutual"), [z[0], z[2]])
    for ours, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, truth)


def test_stacked_logits_and_without_grad(server):
    z, y = problem()
    stacked = torch.stack(z).detach()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(stacked, y, 2.0, "next"), loss(stacked, y, 2.0, "next"))
    leaf, again = (stacked.clone().requires_grad_() for _ in range(2))
    compiled(leaf, y, 2.0, "next").backward()
    loss(again, y, 2.0, "next").backward()
    torch.testing.assert_close(leaf.grad, again.grad)


def test_dynamic_number_of_rows(server):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for n in (6, 9, 17, 33):
        z = [x.requires_grad_() for x in make_logits("random", (3, n, 5), torch.float32, n)]
        compare(loss, compiled, z, torch.zeros(n, dtype=torch.int64), 2.0, "mutual")
    assert counter.frame_count <= 2


def test_the_logits_stay_as_they_are(server):
    z, y = problem(dtype=torch.bfloat16)
    before = [x.detach().clone() for x in z]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    compiled(z, y, 2.0, "mutual").backward()
    assert all(torch.equal(x, b) for x, b in zip(z, before, strict=True))


def gates(z, threshold):
    whole = msdkern.exit_gate(z, threshold, "margin", temperature=1.5)
    step = msdkern.gate_step(z[0], threshold, "entropy")
    rows = torch.arange(z[0].shape[0])
    kept, index = msdkern.compact_rows((z[1], rows), step.stay, step.count)
    after = msdkern.gate_step(kept, threshold, live=step.count)
    out = torch.zeros_like(step.score)
    msdkern.scatter_rows(out, after.score, index, step.count)
    return (*whole, *step, kept, index, *after, out)


@pytest.mark.parametrize("kind", ["float", "tensor"])
def test_gates_in_one_graph_for_every_threshold(kind, server):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(gates, fullgraph=True, backend=counter)
    for threshold in (0.5, 0.3, 0.9, float("inf")):
        z = make_logits("random", (3, 6, 5), torch.float32)
        t = torch.tensor(threshold) if kind == "tensor" else threshold
        found, expected = compiled(z, t), gates(z, t)
        torch.testing.assert_close(found, expected, equal_nan=True)
    assert counter.frame_count <= (1 if kind == "tensor" else 2)


def test_gates_with_inductor(server):
    z = make_logits("random", (3, 6, 5), torch.float32)
    compiled = torch.compile(gates, fullgraph=True)
    torch.testing.assert_close(compiled(z, 0.4), gates(z, 0.4), equal_nan=True)

# SPDX-License-Identifier: Apache-2.0
"""The table that says which of a GPU's executors is first: whole, as its numbers say, and asked
without settling what a compiler leaves open."""

import itertools

import pytest
import torch

import msdkern
from msdkern import executors
from msdkern.executors import order
from msdkern.executors.order import ANY, Region, Shape

ROWS = order.REGIONS["cuda"]
KINDS = ("named", "matrix", "jsd")


@pytest.fixture
def both(monkeypatch):
    """As if a GPU were there."""
    kept = executors.reason
    gpu = ("cuda", "triton")
    monkeypatch.setattr(executors, "reason", lambda name: None if name in gpu else kept(name))
    executors._decide.cache_clear()
    yield gpu
    executors._decide.cache_clear()


def choice(kind, exits, classes, teachers=0):
    """What a loss of that kind is served by on a GPU; the logits are nowhere."""
    given = arguments(kind, [torch.empty(8, classes, device="meta")] * teachers)
    z = [torch.empty(8, classes, device="meta") for _ in range(exits)]
    return executors.select("multi_exit_loss", "cuda", z, given)


def arguments(kind, teachers=()):
    from msdkern.executors.arguments import LossArguments

    number = torch.tensor(1.0)
    return LossArguments(
        list(teachers), None, None, "dense" if kind == "matrix" else "mutual", None, number, number,
        True, "jsd" if kind == "jsd" else "forward_kl", 0.5, True, None, -100, 0.0,
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_loss_has_a_row(kind):
    for exits, classes in itertools.product((1, 7, 8, 32, 64), (1, 10, 1000, 1 << 30)):
        assert order.region_of("cuda", Shape(kind, exits, classes)) is not None


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_a_row_is_what_its_numbers_say_and_holds_its_own_shape(row):
    assert row.first == order.faster(row.cuda, row.triton)
    k, _, c, _ = row.at
    assert order.region_of("cuda", Shape(row.kind, k, c)) is row
    assert eval(order.source(row)[:-1], {"Region": Region, "ANY": ANY}) == row


@pytest.mark.parametrize(
    ("cuda", "triton", "first"),
    [(100, 80, "cuda"), (100, 75, "triton"), (12, 3, "cuda"), (10, 20, "cuda"), (14, 4, "triton")],
)
def test_triton_is_first_where_it_saves_much(cuda, triton, first):
    assert order.faster(cuda, triton) == first


def test_the_table_chooses(both):
    for row in ROWS:
        k, _, c, _ = row.at
        assert choice(row.kind, k, c) == row.first
    assert {row.first for row in ROWS} == set(both)


def test_teachers_count(both, monkeypatch):
    rows = (Region("matrix", 4, ANY, "triton", (4, 8, 8, "float32"), 1.0, 0.1), *ROWS)
    monkeypatch.setitem(order.REGIONS, "cuda", rows)
    assert choice("matrix", 3, 100, teachers=1) == "triton"
    assert choice("matrix", 3, 100, teachers=2) == "cuda"


@pytest.mark.parametrize(
    ("pairs", "divergence", "beta", "kind"),
    [
        ("mutual", "jsd", 0.5, "jsd"), ("dense", "jsd", 0.3, "jsd"), ("none", "jsd", 0.5, "named"),
        ("mutual", "jsd", 1.0, "named"), ("dense", "jsd", 0.0, "matrix"),
        ("last", "reverse_kl", 0.5, "named"), ("dense", "soft_ce", 0.5, "matrix"),
    ],
)  # fmt: skip
def test_kinds(pairs, divergence, beta, kind):
    given = arguments("named")._replace(pairs=pairs, divergence=divergence, beta=beta)
    assert order.kind_of(given) == kind


def test_what_is_first_but_absent_is_left_out(both, monkeypatch):
    kept = executors.reason
    monkeypatch.setattr(executors, "reason", lambda n: "gone" if n == "triton" else kept(n))
    executors._decide.cache_clear()
    assert {choice(row.kind, row.at[0], row.at[2]) for row in ROWS} == {"cuda"}


def test_an_explicit_choice_asks_no_table(both, monkeypatch):
    monkeypatch.setattr(order, "shape_of", None)
    for name in both:
        with msdkern.executor(name):
            assert choice("jsd", 5, 10) == name


def test_ops_without_a_row_take_the_order_of_the_device(both):
    assert executors.select("exit_statistics", "cuda") == executors.PREFERENCE["cuda"][0]


def test_explain_tells_the_order_where_there_is_a_choice(both, monkeypatch):
    lines = msdkern.explain().splitlines()
    begin = lines.index(f"first for losses on cuda ({order.BASIS}):")
    told = [line.strip() for line in lines[begin + 1 :]]
    assert told == [f"{row.extent}: {row.first}" for row in ROWS]
    assert "jsd, up to 5 exits and 16 classes: triton" in told
    kept = executors.reason
    monkeypatch.setattr(executors, "reason", lambda n: "gone" if n == "triton" else kept(n))
    assert executors.shapes() == []


# Compiled ---------------------------------------------------------------------------------------


@pytest.fixture
def on_cpu(monkeypatch):
    """A table for the CPU: plain PyTorch for up to 16 classes."""
    few = Region("named", ANY, 16, "eager", (2, 4, 8, "float32"), 1.0, 1.0)
    monkeypatch.setitem(order.REGIONS, "cpu", (few,))
    if executors.reason("cpu") is not None:
        pytest.skip("two executors are needed")
    executors._decide.cache_clear()
    torch._dynamo.reset()
    seen = []
    kept = executors.implementation
    monkeypatch.setattr(
        executors, "implementation", lambda op, name: seen.append(name) or kept(op, name)
    )
    yield seen
    executors._decide.cache_clear()
    torch._dynamo.reset()


def logits(classes):
    return [torch.randn(4, classes) for _ in range(2)]


def loss(z):
    return msdkern.multi_exit_loss(z, pair_weight="last").loss


class Graphs:
    """A backend that counts compilations and runs what it is given."""

    count = 0

    def __call__(self, graph, inputs):
        self.count += 1
        return graph.forward


@pytest.mark.parametrize(("classes", "name"), [(8, "eager"), (100, "cpu")])
def test_known_sizes_are_looked_up(on_cpu, classes, name):
    z = logits(classes)
    found = torch.compile(loss, backend="eager", fullgraph=True, dynamic=False)(z)
    assert on_cpu == [name]
    torch.testing.assert_close(found, loss(z))
    assert on_cpu == [name, name]


def test_a_size_that_is_left_open_stays_open(on_cpu):
    backend = Graphs()
    run = torch.compile(loss, backend=backend, fullgraph=True, dynamic=True)
    for classes in (8, 24, 100):
        z = logits(classes)
        torch.testing.assert_close(run(z), loss(z))
    assert on_cpu[::2] == ["cpu"] * 3  # the order of the device
    assert backend.count == 1

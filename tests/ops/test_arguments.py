# SPDX-License-Identifier: Apache-2.0
"""Different ways to say the same: names and matrices, numbers and tensors, dtypes of weights."""

import pytest
import torch

import msdkern
from tests.cases import DIVERGENCES, generator, make_logits
from tests.servers import SERVERS, serve

NAMES = ("mutual", "last", "deeper", "next")


@pytest.fixture(params=SERVERS)
def server(request):
    with serve(request.param):
        yield request.param


def outcome(z, target=None, **options):
    z = [x.detach().requires_grad_() for x in z]
    out = msdkern.multi_exit_loss(z, target, **options)
    out.loss.backward()
    return [out.loss.detach(), out.cross_entropy, out.divergence, *(x.grad for x in z)]


def assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("exits", [1, 2, 5])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("name", NAMES)
def test_a_named_pair_weight_is_its_matrix(name, divergence, exits, server):
    z = make_logits("random", (exits, 4, 9), torch.float64)
    matrix = getattr(msdkern.pairs, name)(exits)
    for detach in (True, False):
        options = {"divergence": divergence, "detach_teacher": detach, "temperature": 2.0}
        by_name = outcome(z, pair_weight=name, **options)
        # The kernels' shares 1 / (K - 1) are in float64, the matrix holds them in float32.
        by_matrix = outcome(z, pair_weight=exact(matrix), **options)
        assert_same(by_name, by_matrix)


def exact(matrix):
    """1 / n in float64 for the float32 weights of the named matrices."""
    wide = matrix.double()
    return torch.where(wide > 0, 1.0 / (1.0 / wide).round(), 0.0)


@pytest.mark.parametrize("name", NAMES)
def test_named_pair_weights_ignore_external_teachers(name, server):
    z = make_logits("random", (3, 4, 9), torch.float64)
    teacher = make_logits("random", (2, 4, 9), torch.float64, 5)
    assert_same(outcome(z, pair_weight=name, teacher_logits=teacher), outcome(z, pair_weight=name))


def test_an_external_teacher_is_a_detached_exit(server):
    z = make_logits("random", (3, 4, 9), torch.float64)
    external = torch.tensor([[0.0, 0.0, 0.7], [0.0, 0.0, 0.2]])
    two = outcome(z[:2], pair_weight=external, teacher_logits=z[2:])
    inside = torch.zeros(3, 3)
    inside[:2] = external
    three = outcome(z, pair_weight=inside)
    assert_same([two[0], two[2], *two[3:5]], [three[0], three[2][:2], *three[3:5]])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_weights_of_any_float_dtype(dtype, server):
    z = make_logits("random", (3, 4, 8), torch.float32)
    y = torch.randint(8, (4,), generator=generator(0))
    # Values that every float dtype holds.
    weights = {
        "exit_weight": torch.tensor([0.5, 1.0, 2.0]),
        "pair_weight": torch.tensor([[0.0, 0.5, 0.25], [1.0, 0.0, 0.5], [0.25, 0.75, 0.0]]),
        "class_weight": torch.arange(1, 9) / 8.0,
        "temperature": torch.tensor(2.5),
        "pair_scale": torch.tensor(0.75),
    }
    expected = outcome(z, y, **weights)
    cast = outcome(z, y, **{k: v.to(dtype) for k, v in weights.items()})
    for a, b in zip(cast, expected, strict=True):
        assert torch.equal(a, b)


def test_numbers_and_tensors_say_the_same(server):
    z = make_logits("random", (3, 4, 8), torch.float32)
    numbers = {"temperature": 2.5, "pair_scale": 0.75, "normalizer": 3.0}
    tensors = {k: torch.tensor(v) for k, v in numbers.items()}
    for a, b in zip(
        outcome(z, pair_weight="mutual", **numbers),
        outcome(z, pair_weight="mutual", **tensors),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_exit_weight_as_a_list(server):
    z = make_logits("random", (3, 4, 8), torch.float32)
    y = torch.zeros(4, dtype=torch.int64)
    listed = outcome(z, y, exit_weight=[0.5, 1.0, 2.0])
    tensor = outcome(z, y, exit_weight=torch.tensor([0.5, 1.0, 2.0]))
    assert all(torch.equal(a, b) for a, b in zip(listed, tensor, strict=True))


def test_logits_as_list_tuple_or_one_tensor(server):
    z = make_logits("random", (3, 4, 8), torch.float32)
    forms = (z, tuple(z), torch.stack(z))
    results = [msdkern.multi_exit_loss(x, pair_weight="deeper") for x in forms]
    for other in results[1:]:
        assert torch.equal(other.loss, results[0].loss)
        assert torch.equal(other.confidence, results[0].confidence)


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_bit_equal_twice_and_for_any_number_of_threads(divergence, threads, server):
    z = make_logits("random", (3, 257, 65), torch.float32)
    y = torch.randint(65, (257,), generator=generator(0))
    before = torch.get_num_threads()
    results = []
    try:
        for count in (1, 1, threads):
            torch.set_num_threads(count)
            results.append(
                outcome(z, y, pair_weight="mutual", temperature=3.0, divergence=divergence)
                + list(msdkern.exit_statistics(z))
                + list(msdkern.multi_exit_softmax(z, 3.0))
            )
    finally:
        torch.set_num_threads(before)
    compared = results[:2] if server == "eager" else results  # PyTorch's own sums may differ
    for other in compared[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))

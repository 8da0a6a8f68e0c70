# SPDX-License-Identifier: Apache-2.0
"""Bad input gets one sentence: the op, the rule, the value that broke it."""

import itertools
import math
import re

import numpy as np
import pytest
import torch

import msdkern
from tests.servers import SERVERS, serve

pytestmark = pytest.mark.host

K, N, C = 3, 4, 5
OPS = {
    "multi_exit_loss": msdkern.multi_exit_loss,
    "multi_exit_row_losses": msdkern.multi_exit_row_losses,
    "multi_exit_softmax": msdkern.multi_exit_softmax,
    "exit_statistics": msdkern.exit_statistics,
}
LOSSES = ("multi_exit_loss", "multi_exit_row_losses")


def zeros(*shape, **options):
    return torch.zeros(*(shape or (N, C)), **options)


def exits(count=K, **options):
    return [zeros(**options) for _ in range(count)]


RULE = "logits must be a sequence of [N, C] tensors or one [K, N, C] tensor; got "
ALIKE = "all exits must have the same shape, dtype and device; got "
DTYPE = "logits must be float32, bfloat16, float16 or float64; got "
COUNT = "the number of exits must be between 1 and 32; got "

# name -> (logits, exception, sentence after the op's name)
LOGITS = {
    "one [N, C]": (zeros, ValueError, RULE + "float32 [4, 5]"),
    "nothing": (list, ValueError, RULE + "an empty sequence"),
    "numpy": (lambda: np.zeros((K, N, C), np.float32), ValueError, RULE + "'ndarray'"),
    "numpy exits": (
        lambda: [np.zeros((N, C), np.float32)] * K, ValueError,
        "each exit's logits must be a tensor [N, C]; got ",
    ),
    "1-d exits": (
        lambda: [zeros(5)] * K, ValueError,
        "each exit's logits must be a tensor [N, C]; got float32 [5]",
    ),
    "a number among exits": (
        lambda: [zeros(), 1.0], TypeError, "logits must be a tensor; got 'float'",
    ),
    "none of [K, N, C]": (lambda: zeros(0, N, C), ValueError, COUNT + "0"),
    "too many": (lambda: exits(33), ValueError, COUNT + "33"),
    "too many of [K, N, C]": (lambda: zeros(33, N, C), ValueError, COUNT + "33"),
    "no classes": (
        lambda: [zeros(N, 0)] * K, ValueError,
        "logits must have at least one class; got float32 [4, 0]",
    ),
    "integers": (lambda: exits(dtype=torch.int64), TypeError, DTYPE + "int64 [4, 5]"),
    "bool": (lambda: exits(dtype=torch.bool), TypeError, DTYPE + "bool [4, 5]"),
    "complex": (lambda: exits(dtype=torch.complex64), TypeError, DTYPE + "complex64 [4, 5]"),
    "float8": (
        lambda: exits(dtype=torch.float8_e4m3fn), TypeError, DTYPE + "float8_e4m3fn [4, 5]",
    ),
    "mixed shapes": (
        lambda: [zeros(), zeros(N, 6)], ValueError,
        ALIKE + "'float32 [4, 5] on cpu and float32 [4, 6] on cpu'",
    ),
    "mixed dtypes": (
        lambda: [zeros(), zeros(dtype=torch.float64)], ValueError,
        ALIKE + "'float32 [4, 5] on cpu and float64 [4, 5] on cpu'",
    ),
    "mixed devices": (
        lambda: [zeros(), zeros(device="meta")], ValueError,
        ALIKE + "'float32 [4, 5] on cpu and float32 [4, 5] on meta'",
    ),
    "sparse": (
        lambda: [zeros().to_sparse()] * K, TypeError,
        "logits must be dense; got 'torch.sparse_coo'",
    ),
    "one sparse exit": (
        lambda: [zeros(), zeros().to_sparse()], TypeError,
        "logits must be dense; got 'torch.sparse_coo'",
    ),
}  # fmt: skip


def sentence_of(caught):
    return str(caught.value)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("case", LOGITS)
def test_logits(case, op):
    make, error, sentence = LOGITS[case]
    with pytest.raises(error) as caught:
        OPS[op](make())
    assert sentence_of(caught).startswith(f"{op}: {sentence}")
    assert "\n" not in sentence_of(caught) or case == "numpy exits"


LABEL = "target must be int64 [N] or float [N, C] with N = 4 and C = 5; got "
SCALAR = "must be a number or a 0-d floating-point tensor; got "
NO_GRADIENT = "must not require a gradient (detach it); got "
TEACHER = "each of teacher_logits must be torch.float32 [4, 5] on cpu, like the logits; got "

# keyword arguments -> exception, sentence after the op's name
OPTIONS = [
    ({"target": zeros(N, dtype=torch.int32)}, ValueError, LABEL + "int32 [4]"),
    ({"target": zeros(N + 1, dtype=torch.int64)}, ValueError, LABEL + "int64 [5]"),
    ({"target": zeros(N, 1, dtype=torch.int64)}, ValueError, LABEL + "int64 [4, 1]"),
    ({"target": zeros(N, C + 1)}, ValueError, LABEL + "float32 [4, 6]"),
    ({"target": zeros(N)}, ValueError, LABEL + "float32 [4]"),
    ({"target": zeros(N, C, dtype=torch.bool)}, ValueError, LABEL + "bool [4, 5]"),
    ({"target": [0] * N}, TypeError, "target must be a tensor; got 'list'"),
    ({"target": np.zeros(N, np.int64)}, TypeError, "target must be a tensor; got 'ndarray'"),
    ({"target": zeros(N, dtype=torch.int64, device="meta")}, ValueError,
     "target must be on the device of the logits (cpu); got 'meta'"),
    ({"target": zeros(requires_grad=True)}, ValueError, f"target {NO_GRADIENT}float32 [4, 5]"),
    ({"target": zeros().to_sparse()}, TypeError, "target must be dense; got 'torch.sparse_coo'"),
    ({"temperature": 0.0}, ValueError, "temperature must be positive and finite; got 0.0"),
    ({"temperature": -1}, ValueError, "temperature must be positive and finite; got -1"),
    ({"temperature": math.nan}, ValueError, "temperature must be positive and finite; got nan"),
    ({"temperature": math.inf}, ValueError, "temperature must be positive and finite; got inf"),
    ({"temperature": zeros(1)}, ValueError, f"temperature {SCALAR}float32 [1]"),
    ({"temperature": torch.tensor(2)}, ValueError, f"temperature {SCALAR}int64 []"),
    ({"temperature": torch.tensor(2.0, requires_grad=True)}, ValueError,
     f"temperature {NO_GRADIENT}float32 []"),
    ({"temperature": "2"}, TypeError, "temperature must be a number or a 0-d tensor; got '2'"),
    ({"temperature": None}, TypeError, "temperature must be a number or a 0-d tensor; got None"),
    ({"pair_scale": torch.ones((), requires_grad=True)}, ValueError,
     f"pair_scale {NO_GRADIENT}float32 []"),
    ({"pair_scale": zeros(2)}, ValueError, f"pair_scale {SCALAR}float32 [2]"),
    ({"pair_scale": "1"}, TypeError, "pair_scale must be a number or a 0-d tensor; got '1'"),
    ({"pair_weight": "all"}, ValueError,
     "pair_weight must be one of mutual, last, deeper, next; got 'all'"),
    ({"pair_weight": zeros(K, K + 1)}, ValueError,
     "pair_weight must be floating point [3, 3] or [3, 3, 4]; got float32 [3, 4]"),
    ({"pair_weight": zeros(K, K), "teacher_logits": exits(1)}, ValueError,
     "pair_weight must be floating point [3, 4] or [3, 4, 4]; got float32 [3, 3]"),
    ({"pair_weight": zeros(K, K, dtype=torch.int64)}, ValueError,
     "pair_weight must be floating point [3, 3] or [3, 3, 4]; got int64 [3, 3]"),
    ({"pair_weight": zeros(K, K, requires_grad=True)}, ValueError,
     f"pair_weight {NO_GRADIENT}float32 [3, 3]"),
    ({"pair_weight": zeros(K, K, device="meta")}, ValueError,
     "pair_weight must be on the device of the logits (cpu); got 'meta'"),
    ({"exit_weight": zeros(K + 1)}, ValueError,
     "exit_weight must be floating point [3] or [3, 4]; got float32 [4]"),
    ({"exit_weight": [1.0, 2.0]}, ValueError,
     "exit_weight must be floating point [3] or [3, 4]; got float32 [2]"),
    ({"exit_weight": zeros(K, requires_grad=True)}, ValueError,
     f"exit_weight {NO_GRADIENT}float32 [3]"),
    ({"class_weight": zeros(C + 1)}, ValueError,
     "class_weight must be floating point [5]; got float32 [6]"),
    ({"class_weight": zeros(C, requires_grad=True)}, ValueError,
     f"class_weight {NO_GRADIENT}float32 [5]"),
    ({"teacher_logits": zeros(1, N, C)}, ValueError,
     "teacher_logits must be a sequence of [N, C] tensors; got float32 [1, 4, 5]"),
    ({"teacher_logits": [zeros(N, C + 1)]}, ValueError, TEACHER + "float32 [4, 6]"),
    ({"teacher_logits": [zeros(dtype=torch.float64)]}, ValueError, TEACHER + "float64 [4, 5]"),
    ({"teacher_logits": [zeros(device="meta")]}, ValueError, TEACHER + "float32 [4, 5]"),
    ({"teacher_logits": [zeros(requires_grad=True)]}, ValueError,
     f"teacher_logits {NO_GRADIENT}float32 [4, 5]"),
    ({"teacher_logits": [zeros().to_sparse()]}, TypeError,
     "teacher_logits must be dense; got 'torch.sparse_coo'"),
    ({"teacher_logits": exits(33)}, ValueError,
     "the number of external teachers must be at most 32; got 33"),
    ({"divergence": "kl"}, ValueError,
     "divergence must be one of forward_kl, reverse_kl, jsd, soft_ce; got 'kl'"),
    ({"beta": 1.5}, ValueError, "beta must be between 0 and 1; got 1.5"),
    ({"beta": math.nan}, ValueError, "beta must be between 0 and 1; got nan"),
    ({"label_smoothing": -0.1}, ValueError, "label_smoothing must be between 0 and 1; got -0.1"),
    ({"ignore_index": 1.0}, TypeError, "ignore_index must be an integer; got 1.0"),
]  # fmt: skip

SCALAR_ONLY = [
    ({"reduction": "none"}, ValueError, "reduction must be one of mean, sum; got 'none'"),
    ({"normalizer": -2.0}, ValueError, "normalizer must be finite and not negative; got -2.0"),
    ({"normalizer": math.inf}, ValueError, "normalizer must be finite and not negative; got inf"),
    ({"normalizer": "4"}, TypeError, "normalizer must be a number or a 0-d tensor; got '4'"),
    ({"normalizer": zeros(2)}, ValueError, f"normalizer {SCALAR}float32 [2]"),
    ({"normalizer": torch.tensor(4.0, requires_grad=True)}, ValueError,
     f"normalizer {NO_GRADIENT}float32 []"),
]  # fmt: skip
CASES = [(op, *case) for op in LOSSES for case in OPTIONS]
CASES += [("multi_exit_loss", *case) for case in SCALAR_ONLY]
CASES += [("multi_exit_softmax", *case) for case in OPTIONS if "temperature" in case[0]]


@pytest.mark.parametrize(
    ("op", "options", "error", "sentence"), CASES, ids=[f"{c[0]}-{c[3]}" for c in CASES]
)
def test_options(op, options, error, sentence):
    with pytest.raises(error) as caught:
        OPS[op](exits(), **options)
    assert sentence_of(caught) == f"{op}: {sentence}"


def test_the_largest_number_of_exits_is_legal():
    assert msdkern.exit_statistics(exits(32)).lse.shape == (32, N)


# What the executors check, because only they may read values. -----------------------------------


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize(("op", "label"), list(itertools.product(LOSSES, (-1, C, 1 << 40, -101))))
def test_labels_out_of_range(op, label, server):
    target = torch.tensor([0, -100, label, 1])
    rule = "labels must be in [0, 5) or ignore_index = -100"
    sentence = re.escape(f"{op}: {rule}; got {label}") + "$"
    with serve(server), pytest.raises(ValueError, match=sentence):
        OPS[op](exits(), target)


@pytest.mark.parametrize("server", SERVERS)
def test_minus_one_may_be_the_ignored_label(server):
    with serve(server):
        loss = msdkern.multi_exit_loss(exits(), torch.tensor([0, -1, 4, -1]), ignore_index=-1).loss
    torch.testing.assert_close(loss, torch.tensor(K * math.log(C)))


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("value", [0.0, -2.0, math.nan])
@pytest.mark.parametrize("op", ["multi_exit_loss", "multi_exit_row_losses", "multi_exit_softmax"])
def test_a_temperature_in_a_tensor(op, value, server):
    sentence = re.escape(f"{op}: temperature must be positive and finite; got {value}") + "$"
    with serve(server), pytest.raises(ValueError, match=sentence):
        OPS[op](exits(), temperature=torch.tensor(value))


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("value", [-1.0, math.inf, math.nan])
def test_a_normalizer_in_a_tensor(value, server):
    with serve(server), pytest.raises(ValueError, match="normalizer must be finite"):
        msdkern.multi_exit_loss(
            exits(), zeros(N, dtype=torch.int64), normalizer=torch.tensor(value)
        )


@pytest.mark.parametrize("op", OPS)
def test_dtensor(op, tmp_path):
    import torch.distributed as dist
    from torch.distributed.tensor import Replicate, distribute_tensor

    store = f"file://{tmp_path}/store"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        z = [distribute_tensor(zeros(), mesh, [Replicate()]) for _ in range(K)]
        rule = "logits must be a plain tensor (call .full_tensor() first); got 'a DTensor'"
        for given in (z, [zeros(), z[1]], distribute_tensor(zeros(K, N, C), mesh, [Replicate()])):
            with pytest.raises(TypeError, match=re.escape(f"{op}: {rule}")):
                OPS[op](given)
    finally:
        dist.destroy_process_group()

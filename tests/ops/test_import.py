# SPDX-License-Identifier: Apache-2.0
"""What a fresh process loads, and that the first use may be anywhere."""

import subprocess
import sys

import pytest

PROGRAMS = {
    "importing loads neither PyTorch nor kernels": """
import sys, msdkern
loaded = [m for m in ("torch", "numpy", "msdkern.ops", "msdkern._cpu") if m in sys.modules]
assert not loaded, loaded
""",
    "every public name is there": """
import msdkern
for name in msdkern.__all__:
    assert getattr(msdkern, name) is not None
try:
    msdkern.nonsense
except AttributeError as error:
    assert str(error) == "module 'msdkern' has no attribute 'nonsense'"
else:
    raise SystemExit("nonsense was found")
""",
    "the first use may be inside a compiled function": """
import torch, msdkern
z = [torch.randn(4, 5, requires_grad=True) for _ in range(3)]
f = lambda z: msdkern.multi_exit_loss(z, pair_weight="mutual", temperature=2.0).loss
loss = torch.compile(f, fullgraph=True, backend="aot_eager")(z)
loss.backward()
torch.testing.assert_close(loss, f(z))
""",
    "the first use may be in inference mode": """
import torch, msdkern
z = [torch.randn(4, 5, requires_grad=True) for _ in range(3)]
with torch.inference_mode():
    first = msdkern.multi_exit_loss(z, pair_weight="mutual", temperature=2.5).loss
    msdkern.multi_exit_softmax(z, 2.5)
loss = msdkern.multi_exit_loss(z, pair_weight="mutual", temperature=2.5).loss
loss.backward()
sum(p.square().sum() for p in msdkern.multi_exit_softmax(z, 2.5)).backward()
assert torch.equal(first, loss)
""",
    "the first use may be on fake tensors": """
import torch, msdkern
from torch._subclasses.fake_tensor import FakeTensorMode
with FakeTensorMode():
    msdkern.multi_exit_loss([torch.randn(4, 5)], pair_weight="mutual", temperature=2.5)
    msdkern.multi_exit_softmax([torch.randn(4, 5)], 2.5)
z = [torch.randn(4, 5) for _ in range(3)]
assert msdkern.multi_exit_loss(z, pair_weight="mutual", temperature=2.5).loss.item() > 0
msdkern.multi_exit_softmax(z, 2.5)
""",
    "the first use may be in a second thread": """
import threading, torch, msdkern
results = []
def work():
    z = [torch.randn(4, 5, requires_grad=True) for _ in range(3)]
    msdkern.multi_exit_loss(z, pair_weight="mutual").loss.backward()
    results.append(z[0].grad)
threads = [threading.Thread(target=work) for _ in range(4)]
[t.start() for t in threads]; [t.join() for t in threads]
assert len(results) == 4 and all(g is not None for g in results)
""",
    "default device and dtype change nothing": """
import torch, msdkern
torch.set_default_device("meta")
torch.set_default_dtype(torch.bfloat16)
z = [torch.randn(4, 5, device="cpu", dtype=torch.float32) for _ in range(3)]
for executor in [n for n, why in msdkern.executors.table()["multi_exit_loss"].items() if not why]:
    with msdkern.executor(executor):
        out = msdkern.multi_exit_loss(
            z, pair_weight="mutual", temperature=2.5, exit_weight=[1.0, 2.0, 3.0]
        )
        msdkern.exit_statistics(z), msdkern.multi_exit_softmax(z)
    assert out.loss.item() > 0
    assert out.loss.dtype == out.confidence.dtype == torch.float32
""",
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_fresh_process(name):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAMS[name]],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout

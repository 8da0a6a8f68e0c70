# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels compiled for the host, and the executor `cuda` on CPU tensors with them."""

import ctypes
import importlib.util

import pytest

import msdkern
from msdkern import executors
from msdkern.executors import cuda
from tests.cuda.harness import build


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    """The module `_cuda` with the harness in the place of a GPU."""
    why = build.missing()
    if why:
        pytest.skip(why)
    path = build.compile_module(tmp_path_factory.mktemp("cuda"))
    spec = importlib.util.spec_from_file_location("msdkern._cuda", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.set_order = ctypes.CDLL(str(path)).simt_set_order
    return module


@pytest.fixture
def on_cuda(emulated, monkeypatch):
    """Every op runs on the executor `cuda`, whose device is the harness."""
    monkeypatch.setattr(cuda, "_load", lambda: (emulated, None))
    monkeypatch.setattr(cuda, "reason", lambda: None)
    monkeypatch.setattr(cuda._Cuda, "stream", lambda self, device: 0)
    monkeypatch.setattr(cuda._Cuda, "capturing", lambda self: False)
    monkeypatch.setattr(cuda._Cuda, "wait", lambda self: None)
    monkeypatch.setitem(executors.EXECUTORS, "cuda", ("msdkern.executors.cuda", "cpu"))
    caches = (executors.reason, executors._decide)
    for cached in caches:
        cached.cache_clear()
    cuda._cuda.workspaces.clear()
    emulated.set_order(b"fifo")
    with msdkern.executor("cuda"):
        yield emulated
    cuda._cuda.workspaces.clear()
    for cached in caches:
        cached.cache_clear()

# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels under the address sanitizer, on exactly sized buffers, and under the thread
sanitizer, which finds what a missing barrier leaves unordered."""

from pathlib import Path

import pytest

from tests.cuda.harness import build

# Compiling takes longer than running, and these differ from float32 and bfloat16 in a type alone.
ABSENT = ("f16", "f64")
REFUSAL = """
#include "cuda/loss.cuh"
namespace msdkern {
cudaError_t loss_DTYPE(const msdkern_loss &, Form) { return cudaErrorNotSupported; }
}
"""
# The address sanitizer takes longer to compile than to run, the other one longer to run.
OPTIMIZE = {"asan": "-O0", "tsan": "-O1"}
DRIVER = Path(__file__).resolve().parent / "driver.py"


@pytest.fixture(scope="module", params=["asan", "tsan"])
def sanitized(request, tmp_path_factory):
    mode = request.param
    why = build.missing(mode)
    if why:
        pytest.skip(why)
    folder = tmp_path_factory.mktemp(mode)
    instead = {}
    for dtype in ABSENT:
        path = folder / f"{dtype}.cu"
        path.write_text(REFUSAL.replace("DTYPE", dtype))
        instead[f"loss_{dtype}.cu"] = path
    build.compile_module(folder, mode, instead=instead, optimize=OPTIMIZE[mode])
    return mode, folder


@pytest.mark.parametrize("variables", [{}, {"SIMT_SHARED": "49152"}], ids=["large", "small"])
def test_every_home_and_team(sanitized, variables):
    mode, folder = sanitized
    done = build.start(DRIVER, folder, mode=mode, timeout=300, **variables)
    assert done.returncode == 0, done.stdout[-6000:]
    assert done.stdout.startswith("calls ")


@pytest.mark.parametrize("lie", ["rows", "classes", "gradient", "statistics", "gate", "copy"])
def test_a_call_that_lies_about_its_buffers_is_noticed(sanitized, lie):
    """Without this the test above could not fail."""
    mode, folder = sanitized
    if mode != "asan":
        pytest.skip("the thread sanitizer knows no sizes")
    done = build.start(DRIVER, folder, lie, mode=mode)
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stdout
    assert "not noticed" not in done.stdout

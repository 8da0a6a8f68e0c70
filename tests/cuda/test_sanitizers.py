# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels under the address sanitizer, on exactly sized buffers, and under the thread
sanitizer, which finds what a missing barrier leaves unordered."""

from pathlib import Path

import pytest

from tests.cuda.harness import build

DRIVER = Path(__file__).resolve().parent / "driver.py"


@pytest.fixture(scope="module", params=["asan", "tsan"])
def sanitized(request, tmp_path_factory):
    mode = request.param
    why = build.missing(mode)
    if why:
        pytest.skip(why)
    folder = tmp_path_factory.mktemp(mode)
    build.compile_module(folder, mode)
    return mode, folder


def test_every_home_and_team(sanitized):
    mode, folder = sanitized
    done = build.start(DRIVER, folder, mode=mode, timeout=300)
    assert done.returncode == 0, done.stdout[-6000:]
    assert done.stdout.startswith("calls ")


@pytest.mark.parametrize("lie", ["rows", "classes", "gradient", "statistics"])
def test_a_call_that_lies_about_its_buffers_is_noticed(sanitized, lie):
    """Without this the test above could not fail."""
    mode, folder = sanitized
    if mode != "asan":
        pytest.skip("the thread sanitizer knows no sizes")
    done = build.start(DRIVER, folder, lie, mode=mode)
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stdout
    assert "not noticed" not in done.stdout

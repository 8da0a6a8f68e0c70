# SPDX-License-Identifier: Apache-2.0
"""The native module under sanitizers (address, undefined behaviour), on exactly sized buffers."""

import pytest


def test_every_kernel_stays_inside_its_buffers(drive):
    done = drive()
    assert done.returncode == 0, done.stdout[-6000:]
    assert done.stdout.startswith("isas ")


@pytest.mark.parametrize("lie", ["rows", "classes", "gradient", "statistics", "gate", "copy"])
def test_a_call_that_lies_about_its_buffers_is_noticed(lie, drive):
    """Without this the test above could not fail."""
    done = drive(lie)
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stdout
    assert "not noticed" not in done.stdout

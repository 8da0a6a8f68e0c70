# SPDX-License-Identifier: Apache-2.0
"""Predictions count what a binary does, not what its code is long."""

import pytest

from tests.cuda.harness import build

if why := build.missing():
    pytest.skip(why, allow_module_level=True)

from tests.cuda import count_triton


def test_exits_that_are_met_in_a_loop_are_counted_as_often():
    few, many = (count_triton.binary(k, 1000, "bfloat16", "mutual", "jsd") for k in (9, 18))
    assert few.kernel == many.kernel == "stacked_kernel"
    per_logit = [b.step[0] / (k * b.block) for k, b in ((9, few), (18, many))]
    assert 1.5 < per_logit[1] / per_logit[0] < 2.5

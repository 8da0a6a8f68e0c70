# SPDX-License-Identifier: Apache-2.0
"""Executor `cpu`: the C++ kernels. The only file that reads the pointers of tensors."""

from __future__ import annotations


def reason() -> str | None:
    return "the native module is not built yet"

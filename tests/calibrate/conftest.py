# SPDX-License-Identifier: Apache-2.0
"""Small sets, one thread."""

from tests.infer.conftest import one_thread

__all__ = ["one_thread"]

# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of msdkern against pure PyTorch; `msdkern bench` runs them, `pytest bench` too."""

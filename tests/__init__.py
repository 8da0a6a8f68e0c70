# SPDX-License-Identifier: Apache-2.0
"""The tests. A package, so that test files can share `tests.oracle` and `tests.cases`."""

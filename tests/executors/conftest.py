# SPDX-License-Identifier: Apache-2.0
"""Settings of the environment, for one test."""

import pytest


@pytest.fixture
def settings(monkeypatch):
    return monkeypatch.setenv

"""The stand-ins in place for a test, and out again after it."""

from __future__ import annotations

import pytest

from pixelbytes_kernels import compat


@pytest.fixture
def installed():
    compat.install()
    yield
    compat.uninstall()

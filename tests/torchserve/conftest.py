"""Short temporary folders: the path of a socket in them may have 107 bytes."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def tmp_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As pytest's own, but not named after the test."""
    return tmp_path_factory.mktemp("t")

"""Fixtures: folders of frames for models that echo."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def frames(tmp_path: Path) -> Callable[..., Path]:
    """`frames(b"1", b"2")`: a folder of such frames."""

    def make(*bodies: bytes) -> Path:
        folder = tmp_path / "frames"
        folder.mkdir(exist_ok=True)
        for k, body in enumerate(bodies):
            (folder / f"{k:04d}.bin").write_bytes(body)
        return folder

    return make

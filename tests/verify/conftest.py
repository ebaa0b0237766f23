"""A scripted TorchServe on a real socket, and a frame for it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.verify.scripted import FakeTorchServe


@pytest.fixture
def server() -> Iterator[FakeTorchServe]:
    with FakeTorchServe() as fake:
        thread = threading.Thread(target=fake.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield fake
        finally:
            fake.shutdown()
            thread.join()


@pytest.fixture
def frame(tmp_path: Path) -> Path:
    path = tmp_path / "frame.bin"
    np.zeros((8, 4), np.float32).tofile(path)
    return path

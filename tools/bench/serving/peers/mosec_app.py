"""Mosec server of the model: ``python -m … PORT MODEL WAIT_MS``. The body is the frame."""

from __future__ import annotations

import sys
from typing import Any

import mosec

from tools.bench.serving import sleep_model
from tools.bench.serving.peers import model


class Frames(mosec.Worker):  # type: ignore[misc]
    """Worker from batches of bodies to answers."""

    def __init__(self) -> None:
        """Load the model in the worker, which shares our command line."""
        self.model = model.load(sys.argv[2])

    def deserialize(self, data: bytes) -> Any:
        """Return the frame: the bytes of the body."""
        return data

    def serialize(self, data: Any) -> bytes:
        """Return an answer, which is JSON already."""
        return bytes(data)

    def forward(self, data: Any) -> Any:
        """Run a batch."""
        return self.model(data)


if __name__ == "__main__":
    sys.argv += ["--port", sys.argv[1], "--address", "127.0.0.1", "--timeout", "60000"]
    server = mosec.Server()
    wait_ms = int(sys.argv[3])
    server.append_worker(
        Frames, num=1, max_batch_size=sleep_model.BATCH, max_wait_time=wait_ms, timeout=60, route="/predict"
    )
    server.run()

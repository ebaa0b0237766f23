"""mosec around the model: ``python -m … PORT MODEL WAIT_MS``. The body is the frame."""

from __future__ import annotations

import sys
from typing import Any

import mosec

from tools.bench.serving import sleep_model as slept
from tools.bench.serving.peers import model


class Frames(mosec.Worker):  # type: ignore[misc]
    """Batches of bodies in, answers out."""

    def __init__(self) -> None:
        """In the worker, which has our arguments too."""
        self.model = model.load(sys.argv[2])

    def deserialize(self, data: bytes) -> Any:
        """A frame is its bytes."""
        return data

    def serialize(self, data: Any) -> bytes:
        """It is JSON already."""
        return bytes(data)

    def forward(self, data: Any) -> Any:
        """All of a batch."""
        return self.model(data)


if __name__ == "__main__":
    sys.argv += ["--port", sys.argv[1], "--address", "127.0.0.1", "--timeout", "60000"]
    server = mosec.Server()
    wait_ms = int(sys.argv[3])
    server.append_worker(
        Frames, num=1, max_batch_size=slept.BATCH, max_wait_time=wait_ms, timeout=60, route="/predict"
    )
    server.run()

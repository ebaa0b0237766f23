"""TorchServe handler of the sleep model, with the same batches and answers as the real handlers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from serve.protocol.batch import body_bytes
from serve.protocol.worker import EncodedFrame, Outcome
from serve.worker.handler import Handler
from tools.bench.serving import sleep_model

__all__ = ["SleepHandler"]


class SleepHandler(Handler):
    """Handler that sleeps as long as a batch takes and answers each frame's size and its batch's size."""

    def describe(self) -> dict[str, Any]:
        """Describe a model of point clouds without classes."""
        return {"modality": "lidar", "load_dim": 4, "classes": []}

    def infer(self, frames: Sequence[EncodedFrame]) -> Sequence[Outcome]:
        """Sleep."""
        return sleep_model.answers([body_bytes(frame.body) for frame in frames])

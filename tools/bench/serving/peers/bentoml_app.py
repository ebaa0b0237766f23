"""BentoML around the model: ``bentoml serve …:Frames --arg model=MODEL``.

A frame is a file part of a form: what BentoML batches are lists, and raw bytes it takes one at a time only.
"""

from pathlib import Path
from typing import Any

import bentoml
import orjson
from pydantic import BaseModel

from tools.bench.serving import sleep_model as slept
from tools.bench.serving.peers import model


class Arguments(BaseModel):
    """Of the command line."""

    model: str = "slept"


arguments = bentoml.use_arguments(Arguments)


@bentoml.service(workers=1, traffic={"timeout": 60, "max_concurrency": 1000})
class Frames:
    """Lists of files in, lists of answers out."""

    def __init__(self) -> None:
        """In the worker."""
        self.model = model.load(arguments.model)

    @bentoml.api(batchable=True, max_batch_size=slept.BATCH, max_latency_ms=60_000)  # type: ignore[untyped-decorator]
    def predict(self, frames: list[Path]) -> list[dict[str, Any]]:
        """All of a batch."""
        return [orjson.loads(answer) for answer in self.model([frame.read_bytes() for frame in frames])]

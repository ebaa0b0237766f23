"""BentoML service of the model: ``bentoml serve …:Frames --arg model=MODEL``.

A frame is a file part of a form, because BentoML batches lists and accepts raw bytes only one at a time.
"""

from pathlib import Path
from typing import Any

import bentoml
import orjson
from pydantic import BaseModel

from tools.bench.serving import sleep_model
from tools.bench.serving.peers import model


class Arguments(BaseModel):
    """Command-line arguments of the service."""

    model: str = "sleep"


arguments = bentoml.use_arguments(Arguments)


@bentoml.service(workers=1, traffic={"timeout": 60, "max_concurrency": 1000})
class Frames:
    """Lists of files in, lists of answers out."""

    def __init__(self) -> None:
        """Load the model in the worker."""
        self.model = model.load(arguments.model)

    @bentoml.api(batchable=True, max_batch_size=sleep_model.BATCH, max_latency_ms=60_000)  # type: ignore[untyped-decorator]
    def predict(self, frames: list[Path]) -> list[dict[str, Any]]:
        """Run a batch."""
        return [orjson.loads(answer) for answer in self.model([frame.read_bytes() for frame in frames])]

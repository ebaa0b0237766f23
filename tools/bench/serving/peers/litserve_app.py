"""LitServe server of the model: ``python -m … PORT MODEL``. The body is the frame."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import litserve
from fastapi import Depends, Request, Response

from tools.bench.serving import sleep_model
from tools.bench.serving.peers import model


async def read_body(request: Request) -> bytes:
    """Return the raw body; LitServe by default parses it as JSON."""
    return await request.body()


class Frames(litserve.LitAPI):  # type: ignore[misc]
    """One frame in, its answer out."""

    def setup(self, device: Any) -> None:
        """Load the model in the worker."""
        self.model = model.load(sys.argv[2])

    def decode_request(self, request: Any) -> Any:
        """Return the frame: the bytes of the body."""
        return request

    def batch(self, inputs: Any) -> Any:
        """Return the list of frames as the batch."""
        return inputs

    def predict(self, x: Any) -> Any:
        """Run a batch."""
        return self.model(x)

    def unbatch(self, output: Any) -> Any:
        """Return one answer per frame."""
        return output

    def encode_response(self, output: Any) -> Any:
        """Send an answer, which is JSON already."""
        return Response(output, media_type="application/json")


# LitServe evaluates the annotation object; `from __future__ import annotations` leaves only its text.
Frames.decode_request.__annotations__["request"] = Annotated[bytes, Depends(read_body)]

if __name__ == "__main__":
    # batch_timeout=0 has the lowest latency; it also makes an idle worker spin.
    api = Frames(max_batch_size=sleep_model.BATCH, batch_timeout=0.0, api_path="/predict")
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1, timeout=60)
    server.run(host="127.0.0.1", port=int(sys.argv[1]), generate_client_file=False)

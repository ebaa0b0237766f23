"""LitServe around the model: ``python -m … PORT MODEL``. The body is the frame."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import litserve
from fastapi import Depends, Request, Response

from tools.bench.serving import sleep_model as slept
from tools.bench.serving.peers import model


async def whole(request: Request) -> bytes:
    """The body as it is, which LitServe by itself would take for JSON."""
    return await request.body()


class Frames(litserve.LitAPI):  # type: ignore[misc]
    """One frame in, its answer out."""

    def setup(self, device: Any) -> None:
        """In the worker."""
        self.model = model.load(sys.argv[2])

    def decode_request(self, request: Any) -> Any:
        """A frame is its bytes."""
        return request

    def batch(self, inputs: Any) -> Any:
        """A batch is a list of them."""
        return inputs

    def predict(self, x: Any) -> Any:
        """All of a batch."""
        return self.model(x)

    def unbatch(self, output: Any) -> Any:
        """An answer each."""
        return output

    def encode_response(self, output: Any) -> Any:
        """It is JSON already."""
        return Response(output, media_type="application/json")


# LitServe goes by the type itself; an annotation in the source is only its text here.
Frames.decode_request.__annotations__["request"] = Annotated[bytes, Depends(whole)]

if __name__ == "__main__":
    # A batch_timeout of 0 answers soonest. It is also what makes the worker spin when idle.
    api = Frames(max_batch_size=slept.BATCH, batch_timeout=0.0, api_path="/predict")
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1, timeout=60)
    server.run(host="127.0.0.1", port=int(sys.argv[1]), generate_client_file=False)

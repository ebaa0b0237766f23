"""Client of a gateway or of TorchServe: frames in, typed results out; imports nothing but httpx and numpy.

    from serve.client import Client

    with Client("127.0.0.1:8000") as client:
        result = client.predict("frame.bin", "second", score_thr=0.3)
        print(result.names, result.boxes)

`AsyncClient` is the same for asyncio. docs/client.md has examples; every failure is an error of `serve.errors`.
"""

from serve.client.asynchronous import AsyncClient
from serve.client.blocking import Client
from serve.client.frames import FrameInput, encode_image, encode_points, frame_parts
from serve.client.options import PredictOptions
from serve.client.results import Result
from serve.client.retry import Retry

__all__ = [
    "AsyncClient",
    "Client",
    "FrameInput",
    "PredictOptions",
    "Result",
    "Retry",
    "encode_image",
    "encode_points",
    "frame_parts",
]

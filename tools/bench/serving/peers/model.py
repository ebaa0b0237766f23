"""The model as a function from a batch of request bodies to JSON answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import orjson

from tools.bench.serving import sleep_model

__all__ = ["Model", "load"]

Model = Callable[[Sequence[bytes]], list[bytes]]


def load(name: str) -> Model:
    """Load ``sleep``, or the detector in the folder of an unpacked archive."""
    if name == "sleep":
        return lambda bodies: [
            orjson.dumps(one) for one in sleep_model.answers([len(body) for body in bodies])
        ]
    import torch

    from serve import ops
    from serve.archive import open_directory
    from serve.errors import ServeError
    from serve.protocol.json_bodies import encode_json
    from serve.protocol.options import FrameOptions
    from serve.runtime import load_detector
    from serve.runtime.malloc import disable_malloc_trim
    from serve.settings import Limits

    ops.install()
    disable_malloc_trim()  # as our workers do
    detector = load_detector(open_directory(Path(name)), torch.device("cpu"))

    def answers(bodies: Sequence[bytes]) -> list[bytes]:
        outcomes = detector.run([detector.decode(body, FrameOptions(), Limits()) for body in bodies])
        found = []
        for outcome in outcomes:
            if isinstance(outcome, ServeError):
                raise outcome
            found.append(encode_json(outcome))
        return found

    return answers

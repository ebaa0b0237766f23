"""The model as a function: a batch of bodies in, JSON for each out. Knows no server."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import orjson

from tools.bench.serving import sleep_model as slept

__all__ = ["Model", "load"]

Model = Callable[[Sequence[bytes]], list[bytes]]


def load(name: str) -> Model:
    """``slept``, or the detector in a folder into which an archive was unpacked."""
    if name == "slept":
        return lambda bodies: [orjson.dumps(one) for one in slept.answers([len(body) for body in bodies])]
    import torch

    from serve import ops
    from serve.archive import open_directory
    from serve.errors import ServeError
    from serve.protocol.frames import Limits, FrameOptions, encode_json
    from serve.runtime import load_detector
    from serve.runtime.malloc import keep_freed_memory

    ops.install()
    keep_freed_memory()  # as ours does
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

"""A model without a network: it counts, waits at a gate, and answers with what it was sent."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import MappingProxyType
from typing import Any

from serve.errors import NotReady, ServeError, UndecodableFrame
from serve.predict.models import outcome_of
from serve.protocol.options import FrameOptions


class EchoModel:
    """Answers a frame with the hash of its bytes; rejects ``bad``, and breaks down at ``gone``."""

    identity: Mapping[str, str] = MappingProxyType({"name": "echo", "version": "1.0"})
    modality: Any = "lidar"
    load_dim = 4
    is_remote = False
    description: Any = MappingProxyType({})

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.prepared = 0
        self.gate = threading.Event()
        self.gate.set()
        self._engine = ThreadPoolExecutor(1)
        self._lock = threading.Lock()

    def prepare(self, body: Any, options: FrameOptions) -> Any:
        with self._lock:
            self.prepared += 1
        if body == b"bad":
            raise UndecodableFrame("a bad frame")
        return body

    def submit(self, prepared: Sequence[Future[Any]]) -> Future[list[Any]]:
        return self._engine.submit(self._run, prepared)

    def _run(self, prepared: Sequence[Future[Any]]) -> list[Any]:
        assert self.gate.wait(20)
        self.batches.append(len(prepared))
        return [self._answer(outcome_of(each)) for each in prepared]

    def _answer(self, body: Any) -> Any:
        if isinstance(body, ServeError):
            return body
        if body == b"gone":
            raise NotReady("the server is gone")
        return {
            "bboxes": [[1.0, 2.0, 3.0, 5.0]],
            "scores": [0.5],
            "labels": [0],
            "names": ["car"],
            "classes": ["car"],
            "hash": hashlib.sha256(body).hexdigest(),
        }

    def close(self) -> None:
        self.gate.set()
        self._engine.shutdown()

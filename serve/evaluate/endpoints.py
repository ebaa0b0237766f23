"""Where answers come from: a running server, or an archive that is run in this process."""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from serve.client import Client, Retry
from serve.client.frames import CONTENT_TYPES
from serve.errors import Overloaded
from serve.evaluate.frames import DataFrame
from serve.protocol.json_bodies import encode_json
from serve.protocol.options import FrameOptions
from serve.settings import Limits

__all__ = ["ArchiveEndpoint", "Endpoint", "ServerEndpoint"]

_RETRY = Retry(tuple(0.25 * 2**attempt for attempt in range(6)), kinds=(Overloaded,))


class Endpoint(Protocol):
    """Something that answers frames, several of them at a time; a context manager."""

    @property
    def name(self) -> str:
        """Name of the model, for messages."""

    @property
    def concurrency(self) -> int:
        """Number of frames that it works on at a time."""

    def submit(self, frame: DataFrame) -> Future[Mapping[str, Any]]:
        """Start on a frame; the result is an answer with all detections of the model."""

    def __enter__(self) -> Self:
        """Keep what it needs open."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        """Give up frames that are not begun, and close."""


class ServerEndpoint:
    """A running server, with a connection per frame in progress."""

    def __init__(
        self,
        address: str,
        model: str,
        version: str | None = None,
        *,
        token: str | None = None,
        timeout_s: float = 120.0,
        concurrency: int = 4,
    ) -> None:
        """Check the address without connecting; the arguments are those of `serve.client.Client`."""
        self.name, self.concurrency = model, concurrency
        self._version = version
        self._client = Client(address, token=token, timeout_s=timeout_s, retry=_RETRY)
        self._threads = ThreadPoolExecutor(concurrency, thread_name_prefix="evaluate")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._threads.shutdown(cancel_futures=True)
        self._client.close()

    def submit(self, frame: DataFrame) -> Future[Mapping[str, Any]]:
        """Send a frame on a free connection."""
        return self._threads.submit(self._predict, frame)

    def _predict(self, frame: DataFrame) -> Mapping[str, Any]:
        single = next(iter(frame.parts.values())) if len(frame.parts) == 1 else None
        return self._client.predict(
            frame.parts if single is None else single,
            self.name,
            self._version,
            content_type=CONTENT_TYPES.get(Path(frame.name).suffix.lower()),
            # The model's own threshold, test_cfg.score_thr, is the only one.
            score_thr=0.0,
        )


class ArchiveEndpoint:
    """An archive, opened and run in this process as a worker runs it."""

    concurrency = 1

    def __init__(self, path: Path, folder: Path, device: str, *, trust_code: bool = False) -> None:
        """Verify and open an archive.

        Args:
            path: the ``.mar``.
            folder: empty folder for its content.
            device: ``cpu`` or ``cuda:N``.
            trust_code: allow an archive that carries code.

        Raises:
            ArchiveError, CheckpointError: as `serve.runtime.load_detector`.
        """
        import torch

        from serve import archive
        from serve.runtime import load_detector

        opened = archive.extract(path, folder)
        self.name = opened.metadata.name
        self._detector = load_detector(opened, torch.device(device), trust_code=trust_code)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Do nothing: the model goes with this object."""

    def submit(self, frame: DataFrame) -> Future[Mapping[str, Any]]:
        """Run a frame at once."""
        future: Future[Mapping[str, Any]] = Future()
        body = frame.parts if len(frame.parts) > 1 else next(iter(frame.parts.values()))
        (outcome,) = self._detector.run([self._detector.decode(body, FrameOptions(), Limits())])
        if isinstance(outcome, Exception):
            future.set_exception(outcome)
        else:
            future.set_result(json.loads(encode_json(outcome)))
        return future

"""Models that predictions come from: in this process, or behind a server.

Both take frames in two steps, so that reading and decoding go on while the network computes: `prepare`, which any
thread may call, and `submit`, which queues a batch and returns at once.
"""

from __future__ import annotations

import contextlib
import queue
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

from serve import archive, ops
from serve.archive import Archive
from serve.client import Client, PredictOptions, Retry
from serve.errors import (
    BackendBroken,
    InferenceFailed,
    NotReady,
    Overloaded,
    ServeError,
    UndecodableFrame,
    error_of_frame,
)
from serve.protocol.batch import Body
from serve.protocol.frame_spec import Modality
from serve.protocol.options import FrameOptions
from serve.protocol.worker import Outcome
from serve.settings import Settings
from serve.storage.uri import redact_url

if TYPE_CHECKING:
    from serve.runtime import Detector

__all__ = ["LocalModel", "Model", "RemoteModel", "ServedAnswer", "connect", "open_archive"]

_LAST_REQUEST_S = 1.0  # that closing waits for
_RETRIES_S = (0.2, 0.5, 1.0, 2.0, 4.0, 8.0)


class Model(Protocol):
    """What `serve.predict` needs of a model."""

    @property
    def identity(self) -> Mapping[str, str]:
        """Name, version and hash or address of the model, for the record of a run."""

    @property
    def modality(self) -> Modality | None:
        """Kind of frames that it takes; None if the server does not describe its models."""

    @property
    def load_dim(self) -> int | None:
        """Float32 numbers per point in a ``.bin``; None without a point cloud or a description by the server."""

    @property
    def description(self) -> Mapping[str, Any]:
        """What a worker says of its model (`serve.runtime.Detector.describe`); empty if the server does not."""

    @property
    def is_remote(self) -> bool:
        """Whether frames travel over a network."""

    def prepare(self, body: Body, options: FrameOptions) -> Any:
        """Check and decode one frame; may be called by several threads.

        Raises:
            ClientError: not a frame of this model.
        """

    def submit(self, prepared: Sequence[Future[Any]]) -> Future[list[Outcome]]:
        """Queue a batch of what `prepare` returned; gives one outcome per frame, in order.

        The future raises only what concerns every frame, such as a server that is gone.
        """

    def close(self) -> None:
        """Release the model."""


class _Closing(ABC):
    """Context that closes at its end."""

    def __enter__(self) -> Self:
        """Keep it open for the block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()

    @abstractmethod
    def close(self) -> None:
        """Release the model."""


class LocalModel(_Closing):
    """A detector in this process; loads and computes in one thread of its own, as a server's worker does."""

    is_remote = False

    def __init__(
        self, detector: Detector, engine: ThreadPoolExecutor, folder: contextlib.ExitStack, sha256: str
    ) -> None:
        """Take over what `open_archive` made."""
        self.detector = detector
        self._engine, self._folder = engine, folder
        self._limits = Settings.from_environment().limits
        metadata = detector.metadata
        self.identity = {"name": metadata.name, "version": metadata.version, "sha256": sha256}
        self.description: Mapping[str, Any] = detector.describe()

    @property
    def modality(self) -> Modality:
        """Kind of frames that it takes."""
        return self.description["modality"]  # type: ignore[no-any-return]

    @property
    def load_dim(self) -> int | None:
        """Float32 numbers per point in a ``.bin``."""
        return self.detector.metadata.load_dim

    def prepare(self, body: Body, options: FrameOptions) -> Any:
        """Decode a frame, with the limits of a server."""
        return self.detector.decode(body, options, self._limits)

    def submit(self, prepared: Sequence[Future[Any]]) -> Future[list[Outcome]]:
        """Queue a batch for the thread that computes."""
        return self._engine.submit(self._run, prepared)

    def _run(self, prepared: Sequence[Future[Any]]) -> list[Outcome]:
        outcomes: dict[int, Outcome] = {}
        frames: dict[int, Any] = {}
        for i, each in enumerate(prepared):
            found = outcome_of(each)
            (outcomes if isinstance(found, ServeError) else frames)[i] = found
        if frames:
            outcomes.update(zip(frames, self.detector.run(list(frames.values())), strict=True))
        return [outcomes[i] for i in range(len(prepared))]

    def close(self) -> None:
        """Wait for the batch that runs, and remove the unpacked archive."""
        self._engine.shutdown(wait=True, cancel_futures=True)
        self._folder.close()


def open_archive(
    path: Path, device: str | None = None, *, trust_code: bool = False, threads: int = 0
) -> LocalModel:
    """Load an archive into this process and run its golden frame, as a server's worker does.

    Args:
        path: the ``.mar``.
        device: ``cpu`` or ``cuda:N``; the first GPU if None, else the CPU.
        trust_code: allow code packed in the archive.
        threads: torch threads; 0 for what the settings say.

    Raises:
        SetupError: it cannot be loaded, or its golden frame has other predictions here.
    """
    settings = Settings.from_environment()
    ops.install(settings.ops, cache_dir=settings.cache_dir)
    import torch

    from serve.runtime.malloc import disable_malloc_trim
    from serve.runtime.model import parse_device
    from serve.storage.hashes import sha256_of

    chosen = parse_device(device or ("cuda:0" if torch.cuda.is_available() else "cpu"))
    if chosen.type == "cpu" and settings.keep_heap:
        disable_malloc_trim()  # before a second thread starts
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mmdet3d-serve-predict-")))
        opened = archive.extract(path, folder)
        engine = ThreadPoolExecutor(1, thread_name_prefix="engine")
        stack.callback(engine.shutdown)
        detector = engine.submit(_load, opened, chosen, settings, trust_code, threads).result()
        return LocalModel(detector, engine, stack.pop_all(), sha256_of(path))


def _load(opened: Archive, device: Any, settings: Settings, trust_code: bool, threads: int) -> Detector:
    import torch

    from serve.runtime import load_detector
    from serve.runtime.selftest import self_test
    from serve.worker.cpu_quota import available_cores

    torch.set_num_threads(threads or settings.threads or min(torch.get_num_threads(), available_cores()))
    detector = load_detector(
        opened,
        device,
        trust_code=trust_code or settings.trust_archive_code,
        skip_background=settings.skip_background,
    )
    self_test(detector, opened)
    return detector


class RemoteModel(_Closing):
    """A model behind a gateway or TorchServe, over ``/predictions``."""

    is_remote = True

    def __init__(
        self,
        url: str,
        name: str,
        version: str | None = None,
        *,
        token: str | None = None,
        timeout_s: float = 120.0,
        connections: int = 1,
    ) -> None:
        """See `connect`."""
        self._url, self._name, self._version = url, name, version
        self._asked: queue.SimpleQueue[tuple[Future[Outcome], Future[Any]] | None] = queue.SimpleQueue()
        # Not of an executor, whose threads the interpreter waits for: Ctrl-C would wait for a server that hangs.
        self._threads = [
            threading.Thread(target=self._work, name=f"client{k}", daemon=True) for k in range(connections)
        ]
        for thread in self._threads:
            thread.start()
        self._client = Client(url, token=token, timeout_s=timeout_s)
        try:
            self.description: Mapping[str, Any] = self._describe()
        except BaseException:
            self.close()
            raise
        self.identity = {
            "url": redact_url(url),
            "name": name,
            "version": version or str(self.description.get("version", "")),
        }

    def _describe(self) -> Mapping[str, Any]:
        """Read the gateway's description, and wait for a model that is loading; empty of a TorchServe."""
        for pause_s in (*_RETRIES_S, 0.0):
            found = self._client.describe(self._name, self._version)
            if found is None:
                return {}
            if "modality" in found:
                return found
            why = f"{found.get('status')}: {found.get('reason', 'try again later')}"
            if "reason" in found:
                break
            time.sleep(pause_s)
        raise NotReady(f"model '{self._name}' of {self._url} is {why}")

    @property
    def modality(self) -> Modality | None:
        """Kind of frames that it takes; None if the server does not describe its models."""
        return self.description.get("modality")

    @property
    def load_dim(self) -> int | None:
        """Float32 numbers per point in a ``.bin``; None if the server does not describe its models."""
        return self.description.get("load_dim")

    def prepare(self, body: Body, options: FrameOptions) -> Any:
        """Keep the bytes; the server decodes them."""
        return body, options

    def submit(self, prepared: Sequence[Future[Any]]) -> Future[list[Outcome]]:
        """Send the frames of a batch side by side; the server batches them itself."""
        answers: list[Future[Outcome]] = [Future() for _ in prepared]
        for answer, each in zip(answers, prepared, strict=True):
            self._asked.put((answer, each))
        done: Future[list[Outcome]] = Future()
        left = [len(answers)]
        lock = threading.Lock()

        def count(_: Future[Outcome]) -> None:
            with lock:
                left[0] -= 1
                if left[0]:
                    return
            try:
                done.set_result([answer.result() for answer in answers])
            except BaseException as error:
                done.set_exception(error)

        for answer in answers:
            answer.add_done_callback(count)
        return done

    def _work(self) -> None:
        """Send one frame after the other."""
        while (asked := self._asked.get()) is not None:
            answer, prepared = asked
            try:
                answer.set_result(self._ask(prepared))
            except BaseException as error:
                answer.set_exception(error)

    def _ask(self, prepared: Future[Any]) -> Outcome:
        found = outcome_of(prepared)
        if isinstance(found, ServeError):
            return found
        body, options = found
        # Frames of an overloaded or restarting server are worth more patience than a single call of a user.
        retry = Retry(_RETRIES_S, kinds=(Overloaded, NotReady, BackendBroken), connection_failures=True)
        try:
            result = self._client.predict(body, self._name, self._version, retry=retry, **_given(options))
        except (NotReady, BackendBroken):
            raise
        except ServeError as error:
            if error.status in (401, 403, 404):  # so it would be for every frame
                raise
            return error
        return ServedAnswer(result, result.encoded)

    def close(self) -> None:
        """Close the connections; a request that takes longer than a second is left alone."""
        for _ in self._threads:
            self._asked.put(None)
        for thread in self._threads:
            thread.join(_LAST_REQUEST_S)
        self._client.close()


def connect(
    url: str,
    name: str,
    version: str | None = None,
    *,
    token: str | None = None,
    timeout_s: float = 120.0,
    connections: int = 1,
) -> RemoteModel:
    """Take predictions from a server.

    Args:
        url: address of the gateway (port 8000) or of TorchServe (port 8080).
        name: name of the served model.
        version: its version; the server's default if None.
        token: bearer token or API key.
        timeout_s: timeout of one answer, seconds.
        connections: requests at a time.

    Raises:
        NotReady: nothing listens there.
        ModelNotFound: the gateway has no such model.
    """
    return RemoteModel(url, name, version, token=token, timeout_s=timeout_s, connections=connections)


class ServedAnswer(dict[str, Any]):
    """An answer with the bytes in which a server sent it."""

    def __init__(self, answer: Mapping[str, Any], encoded: bytes) -> None:
        """See the class."""
        super().__init__(answer)
        self.encoded = encoded


def _given(options: FrameOptions) -> PredictOptions:
    """Return the options that differ from their defaults."""
    given: Any = {
        each.name: value for each in fields(options) if (value := getattr(options, each.name)) != each.default
    }
    if options.class_thr:
        given["class_thr"] = dict(options.class_thr)
    found: PredictOptions = given
    return found


def outcome_of(prepared: Future[Any]) -> Any:
    """Return what a frame was decoded to, or the error of its outcome."""
    try:
        return prepared.result()
    except Exception as error:
        return outcome_of_error(error)


def outcome_of_error(error: Exception) -> ServeError:
    """Return the outcome of a frame that could not be read or decoded."""
    kind = InferenceFailed if isinstance(error, MemoryError) else UndecodableFrame
    return error_of_frame(error, kind, "the frame cannot be read")

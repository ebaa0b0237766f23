"""The client for programs with threads."""

from __future__ import annotations

import ssl
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import CancelledError, Future
from functools import partial
from types import TracebackType
from typing import Any, Literal, Self, TypeVar, Unpack, overload

import httpx

from serve.client.connection import Connections, connection_arguments, read_headers
from serve.client.frames import FrameInput
from serve.client.many import Threads, Window, check_many
from serve.client.options import PredictOptions
from serve.client.requests import CONNECT_S, Calls, Reply, Send, Steps, Wait
from serve.client.results import Result
from serve.client.retry import Retry
from serve.errors import ServeError

__all__ = ["Client"]

T = TypeVar("T")


class Client:
    """Connections to one server, for any number of threads; a context manager.

    Proxies in the environment are ignored, so that the client reaches the server at the given address.

    Args:
        address: ``host:port`` or a full ``http(s)://`` URL, of a gateway (port 8000) or TorchServe (port 8080).
        token: bearer token or API key, sent with every request; never printed.
        timeout_s: deadline of a call, repetitions included, seconds.
        retry: when a request is sent again; ``Retry(())`` never.
        compress: ask for compressed answers, for slow networks.
        verify: TLS context, for a certificate that the system does not know.

    Raises:
        BadRequest: the address is none, or no header can hold the token.
    """

    def __init__(
        self,
        address: str,
        *,
        token: str | None = None,
        timeout_s: float = 120.0,
        retry: Retry | None = None,
        compress: bool = False,
        verify: ssl.SSLContext | None = None,
    ) -> None:
        self._calls = Calls(address, timeout_s, retry or Retry())
        arguments = connection_arguments(self._calls.url, token, compress, verify)
        self._connections = Connections(lambda: httpx.Client(**arguments))

    def __enter__(self) -> Self:
        """Keep connections open for several requests."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close them."""
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._connections.get().close()

    def predict(
        self,
        frame: FrameInput,
        model: str,
        version: str | None = None,
        *,
        content_type: str | None = None,
        timeout_s: float | None = None,
        retry: Retry | None = None,
        **options: Unpack[PredictOptions],
    ) -> Result:
        """Send one frame and return its result.

        Args:
            frame: see `serve.client.frames.encode_frame`: a path, bytes, an array, a folder of parts, parts by name.
            model: name of the served model.
            version: its version; the server's default if None.
            content_type: media type of bytes; by default by the suffix of a path.
            timeout_s: deadline of this call, seconds, in place of the client's; passed on to the gateway.
            retry: in place of the client's.
            options: see `PredictOptions`.

        Raises:
            NotReady: nothing listens at the address, or the server is starting, draining or lost its worker.
            DeadlineExceeded: no answer within the deadline.
            BackendBroken: the connection was lost, or the answer is not one.
            BadRequest: the client is closed, or `model` or `version` is no name.
            ServeError: the error in the server's answer, as the class of its code.
        """
        return self._run(
            self._calls.predict(
                frame, model, version, options, content_type=content_type, timeout_s=timeout_s, retry=retry
            )
        )

    @overload
    def predict_many(
        self,
        frames: Iterable[FrameInput],
        model: str,
        version: str | None = None,
        *,
        concurrency: int = 8,
        return_errors: Literal[False] = False,
        timeout_s: float | None = None,
        **options: Unpack[PredictOptions],
    ) -> Iterator[Result]: ...

    @overload
    def predict_many(
        self,
        frames: Iterable[FrameInput],
        model: str,
        version: str | None = None,
        *,
        concurrency: int = 8,
        return_errors: bool,
        timeout_s: float | None = None,
        **options: Unpack[PredictOptions],
    ) -> Iterator[Result | ServeError]: ...

    def predict_many(
        self,
        frames: Iterable[FrameInput],
        model: str,
        version: str | None = None,
        *,
        concurrency: int = 8,
        return_errors: bool = False,
        timeout_s: float | None = None,
        **options: Unpack[PredictOptions],
    ) -> Iterator[Result | ServeError]:
        """Send many frames side by side; yields their results in order.

        Frames are read as results are taken, at most twice `concurrency` ahead, so that memory does not grow.

        Args:
            frames: the frames, each as for `predict`.
            model: name of the served model.
            version: its version; the server's default if None.
            concurrency: requests at a time.
            return_errors: yield the error of a frame in its place instead of raising it.
            timeout_s: deadline of each frame, seconds.
            options: see `PredictOptions`.

        Raises:
            UnknownOption: `concurrency` is no such number, or the frames are of a track session and would arrive in
                any order.
            UndecodableFrame: `frames` is a single frame.
            ServeError: as `predict`, for the first frame that fails, unless `return_errors`.
        """
        check_many(frames, options, concurrency)
        threads = Threads(concurrency)
        window: Window[Future[Result]] = Window(2 * concurrency)

        def send(frame: FrameInput) -> Result:
            steps = self._calls.predict(frame, model, version, options, timeout_s=timeout_s)
            return self._run(steps, threads.stopped)

        wait = True
        try:
            for frame in frames:
                window.add(threads.submit(partial(send, frame)))
                for each in window.take():
                    yield _outcome(each, return_errors)
            for each in window.take(ended=True):
                yield _outcome(each, return_errors)
        except (KeyboardInterrupt, SystemExit):
            wait = False
            raise
        finally:
            threads.stop(wait=wait)

    def draw(
        self,
        frame: FrameInput,
        model: str,
        version: str | None = None,
        *,
        content_type: str | None = None,
        timeout_s: float | None = None,
        **options: Unpack[PredictOptions],
    ) -> bytes:
        """Send one frame and return a PNG of it with its detections, which the gateway draws.

        The arguments are those of `predict`.

        Raises:
            BadRequest: the answer cannot be drawn, or the server is TorchServe.
            ServeError: as `predict`.
        """
        steps = self._calls.draw(
            frame, model, version, options, content_type=content_type, timeout_s=timeout_s
        )
        return self._run(steps)

    def models(self) -> list[dict[str, Any]] | None:
        """Return the gateway's descriptions of its models; None if the server is TorchServe.

        Raises:
            ServeError: as `predict`.
        """
        return self._run(self._calls.models())

    def describe(self, model: str, version: str | None = None) -> dict[str, Any] | None:
        """Return the gateway's description of a model: modality, parts, classes and so on.

        Args:
            model: name of the served model.
            version: its version; the default one if None.

        Returns:
            One entry of ``GET /models``; None if the server is TorchServe, which has no such route.

        Raises:
            ModelNotFound: the gateway has no such model or version.
            ServeError: as `predict`.
        """
        return self._run(self._calls.describe(model, version))

    def _run(self, steps: Steps[T], stopped: threading.Event | None = None) -> T:
        """Do what a call asks for, until it returns; a call that is `stopped` does not go on after a pause."""
        try:
            step = next(steps)
            while True:
                try:
                    if isinstance(step, Send):
                        done: Any = self._send(step)
                    elif isinstance(step, Wait):
                        if stopped is None:
                            time.sleep(step.seconds)
                        elif stopped.wait(step.seconds):
                            raise CancelledError
                        done = None
                    else:
                        done = step.call()
                except ServeError as error:
                    step = steps.throw(error)
                else:
                    step = steps.send(done)
        except StopIteration as end:
            value: T = end.value
            return value

    def _send(self, step: Send) -> Reply:
        end = time.monotonic() + step.timeout_s
        timeout = httpx.Timeout(step.timeout_s, connect=min(step.timeout_s, CONNECT_S))
        with (
            self._calls.map_errors(step),
            self._connections.get_open().stream(**step.request.arguments(), timeout=timeout) as response,
        ):
            content = bytearray()
            for piece in response.iter_bytes():
                content += piece
                if time.monotonic() > end:  # httpx bounds each piece, not all of them
                    raise TimeoutError
            return Reply(response.status_code, read_headers(response), bytes(content))


def _outcome(future: Future[Result], return_errors: bool) -> Result | ServeError:
    try:
        return future.result()
    except ServeError as error:
        if return_errors:
            return error
        raise

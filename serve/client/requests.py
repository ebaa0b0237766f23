"""The protocol without a network: what a call sends, and what its answer means.

A call is a generator. It yields what its driver has to do (`Work`, `Send`, `Wait`), gets the result back, or the
error thrown in, and returns the value of the call. `serve.client.blocking` and `serve.client.asynchronous` drive the
same generators.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar
from urllib.parse import quote

import httpx
import numpy as np

from serve.client.frames import EncodedBody, FrameInput, encode_frame
from serve.client.options import PredictOptions, option_headers
from serve.client.results import Result
from serve.client.retry import Retry
from serve.errors import (
    BackendBroken,
    BadRequest,
    DeadlineExceeded,
    ModelNotFound,
    NotReady,
    ServeError,
    UnknownOption,
    error_from_response,
)

__all__ = ["CONNECT_S", "Calls", "Reply", "Request", "Send", "Steps", "Wait", "Work"]

CONNECT_S = 10.0  # enough for any server that runs
_MAX_QUOTED_CHARS = 200  # of an unexpected answer in an error message
# Longest deadline that is passed on: the gateway's default of the longest that a request may name.
_MAX_PASSED_ON_S = 300.0
_LONGEST_WAIT_S = 1e6  # of a socket, which takes no endless number of seconds
_DEADLINE = "X-Timeout-Ms"
T = TypeVar("T")


@dataclass(frozen=True)
class Request:
    """One HTTP request."""

    method: str
    path: str
    headers: Mapping[str, str] = field(default_factory=dict)
    body: EncodedBody = b""

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of httpx: the parts of a frame are the files of a form."""
        found: dict[str, Any] = {"method": self.method, "url": self.path, "headers": dict(self.headers)}
        if isinstance(self.body, dict):
            files = {
                name: (name, bytes(part), "application/octet-stream") for name, part in self.body.items()
            }
            return {**found, "files": files}
        return {**found, "content": bytes(self.body)}


@dataclass(frozen=True)
class Reply:
    """One HTTP response, read to its end."""

    status: int
    headers: Mapping[str, str]
    content: bytes

    def document(self) -> Any:
        """Return the parsed body, None if it is not JSON, or nested too deep for a parser."""
        try:
            return json.loads(self.content)
        except (ValueError, RecursionError):
            return None

    def error(self) -> ServeError:
        """Return the error that the response stands for."""
        if 300 <= self.status < 400:
            target = self.headers.get("location", "nowhere")[:_MAX_QUOTED_CHARS]
            return BackendBroken(
                f"the server answered {self.status}, a redirect to {target}, and redirects are not followed; pass the "
                "address of the gateway itself"
            )
        return error_from_response(self.status, self.document(), self.content.decode(errors="replace"))


@dataclass(frozen=True)
class Send:
    """Send a request, and give back its `Reply` within `timeout_s` seconds, what is left of `deadline_s`."""

    request: Request
    timeout_s: float
    deadline_s: float


@dataclass(frozen=True)
class Wait:
    """Wait for so many seconds."""

    seconds: float


@dataclass(frozen=True)
class Work:
    """Call off the event loop, and give back what it returns."""

    call: Callable[[], Any]


Steps = Generator[Send | Wait | Work, Any, T]


@dataclass(frozen=True)
class Calls:
    """Calls of one server.

    Args:
        address: ``host:port`` or a full ``http(s)://`` URL.
        timeout_s: deadline of a call that names none, seconds.
        retry: rule of repetition.

    Raises:
        BadRequest: the address is none.
    """

    address: str
    timeout_s: float
    retry: Retry

    def __post_init__(self) -> None:
        _check_deadline(self.timeout_s)

    @property
    def url(self) -> httpx.URL:
        """The server's address as a URL."""
        text = self.address.strip()
        try:
            parsed = httpx.URL(text if "://" in text else f"http://{text}")
            if parsed.scheme not in ("http", "https") or not parsed.host or text.startswith("unix:"):
                raise httpx.InvalidURL("no host")
            if parsed.query or parsed.fragment or not 0 < (parsed.port or 80) < 1 << 16:
                raise httpx.InvalidURL("no address of a server")
        except (httpx.InvalidURL, ValueError) as error:
            message = f"invalid server address {self.where!r}; use host:port, for example 127.0.0.1:8080"
            raise BadRequest(message) from error
        return parsed

    @property
    def where(self) -> str:
        """The address as messages show it, without a password."""
        return re.sub(r"^(\w+://)?[^/@]*@", r"\1", self.address.strip())

    # Calls

    def predict(
        self,
        frame: FrameInput,
        model: str,
        version: str | None,
        options: PredictOptions,
        *,
        content_type: str | None = None,
        timeout_s: float | None = None,
        retry: Retry | None = None,
    ) -> Steps[Result]:
        """Send a frame; returns its result."""
        request = self._predict(frame, model, version, options, content_type, timeout_s)
        return (yield from self._exchange(request, self._read_result, timeout_s, retry))

    def draw(
        self,
        frame: FrameInput,
        model: str,
        version: str | None,
        options: PredictOptions,
        *,
        content_type: str | None = None,
        timeout_s: float | None = None,
    ) -> Steps[bytes]:
        """Send a frame; returns its picture with the detections."""
        request = self._predict(frame, model, version, options, content_type, timeout_s, accept="image/png")
        return (yield from self._exchange(request, self._read_picture, timeout_s))

    def models(self, model: str | None = None) -> Steps[list[dict[str, Any]] | None]:
        """Ask for the descriptions of all models, or of the versions of one; returns None for TorchServe."""
        path = "/models" if model is None else f"/models/{_segment('model', model)}"
        request = Work(lambda: Request("GET", path))
        return (yield from self._exchange(request, self._read_models))

    def describe(self, model: str, version: str | None) -> Steps[dict[str, Any] | None]:
        """Ask for the description of one version of a model; returns None for TorchServe."""
        entries = yield from self.models(model)
        if entries is None:
            return None
        for each in entries:
            if each.get("version") == version if version is not None else each.get("default"):
                return each
        raise ModelNotFound(f"{self.where} has no version {version} of model '{model}'")

    # Requests

    def _predict(
        self,
        frame: FrameInput,
        model: str,
        version: str | None,
        options: PredictOptions,
        content_type: str | None,
        timeout_s: float | None,
        accept: str = "application/json",
    ) -> Work:
        if timeout_s is not None:
            _check_deadline(timeout_s)
        path = f"/predictions/{_segment('model', model)}"
        if version is not None:
            path += f"/{_segment('version', version)}"
        headers = {"Accept": accept, **option_headers(options)}
        if timeout_s is not None and timeout_s <= _MAX_PASSED_ON_S:  # so that nothing late is computed
            headers[_DEADLINE] = _milliseconds(timeout_s)
        return Work(partial(_with_body, Request("POST", path, headers), frame, content_type))

    def _exchange(
        self,
        request: Work,
        read: Callable[[Reply], T],
        timeout_s: float | None = None,
        retry: Retry | None = None,
    ) -> Steps[T]:
        """Make a request, send it, again if need be, and return what `read` makes of the answer."""
        limit_s, retry = self.timeout_s if timeout_s is None else timeout_s, retry or self.retry
        end = time.monotonic() + limit_s
        made: Request = yield request
        attempt = 0
        while True:
            attempt += 1
            reply: Reply | None = None
            left_s = min(max(0.001, end - time.monotonic()), _LONGEST_WAIT_S)
            try:
                reply = yield Send(_with_deadline(made, left_s), left_s, limit_s)
                return read(reply)
            except ServeError as error:
                pause_s = retry.pause_s(error, attempt, None if reply is None else reply.headers)
                if pause_s is None or time.monotonic() + pause_s >= end:
                    raise
            yield Wait(pause_s)

    # Answers

    def _read_result(self, reply: Reply) -> Result:
        answer = reply.document()
        if reply.status != 200:
            raise reply.error()
        if not isinstance(answer, dict):
            shown = reply.content[:_MAX_QUOTED_CHARS].decode(errors="replace")
            raise BackendBroken(
                f"unexpected answer of {self.where}, not the detections of one frame: {shown}"
            )
        if "error" in answer:  # an error with status 200 violates the contract
            raise error_from_response(502, answer)
        return Result(answer, reply.content, reply.headers)

    def _read_picture(self, reply: Reply) -> bytes:
        if reply.status != 200:
            raise reply.error()
        if reply.headers.get("content-type") != "image/png":
            raise BadRequest(f"{self.where} draws no pictures; use the gateway's address (port 8000)")
        return reply.content

    def _read_models(self, reply: Reply) -> list[dict[str, Any]] | None:
        answer = reply.document()
        is_own = isinstance(answer, dict) and isinstance(answer.get("error"), dict)
        if reply.status in (404, 405) and not is_own:
            return None  # TorchServe has no such route
        if reply.status != 200:
            raise reply.error()
        if not isinstance(answer, list) or not all(isinstance(each, dict) for each in answer):
            raise BackendBroken(f"unexpected answer of {self.where}, not a list of models")
        return answer

    @contextmanager
    def map_errors(self, step: Send) -> Iterator[None]:
        """Map exceptions of httpx to errors of `serve.errors`."""
        where = self.where
        try:
            yield
        except httpx.ConnectTimeout as error:
            shown = min(step.timeout_s, CONNECT_S)
            raise NotReady(f"cannot connect to {where} within {shown:g} s; check the address") from error
        except (httpx.TimeoutException, TimeoutError) as error:
            raise DeadlineExceeded(f"{where} did not answer within {step.deadline_s:g} s") from error
        except httpx.ConnectError as error:
            message = f"cannot connect to {where} ({error}); start the server, or pass its address"
            raise NotReady(message) from error
        except httpx.DecodingError as error:
            raise BackendBroken(f"unexpected answer of {where}: {error}") from error
        except httpx.TransportError as error:
            raise BackendBroken(f"lost the connection to {where}: {error}") from error


def _with_body(request: Request, frame: FrameInput, content_type: str | None) -> Request:
    body, found = encode_frame(frame)
    headers = (
        request.headers
        if isinstance(body, dict)
        else {"Content-Type": content_type or found, **request.headers}
    )
    return Request(request.method, request.path, headers, body)


def _with_deadline(request: Request, left_s: float) -> Request:
    """Return a request that passes its deadline on with what is left of that."""
    if _DEADLINE not in request.headers:
        return request
    return replace(request, headers={**request.headers, _DEADLINE: _milliseconds(left_s)})


def _check_deadline(seconds: Any) -> None:
    if isinstance(seconds, bool) or not isinstance(seconds, int | float | np.integer) or not seconds > 0:
        raise UnknownOption(
            f"timeout_s must be seconds above 0, or math.inf for no deadline, got {seconds!r}"
        )


def _segment(what: str, name: Any) -> str:
    """Return a name as a segment of a path."""
    if not isinstance(name, str) or name in ("", ".", ".."):
        raise BadRequest(f"{what} must be the name of a served {what}, a text, got {name!r}")
    return quote(name, safe="")


def _milliseconds(seconds: float) -> str:
    return f"{max(1.0, seconds * 1000):.0f}"

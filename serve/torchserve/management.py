"""TorchServe's management API (a Unix socket, or port 8081) and its tokens: their only client and reader.

`ManagementClient` blocks, `AsyncManagementClient` belongs to an event loop; paths, answers and errors are the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import httpx

from serve.errors import (
    BackendBroken,
    DeadlineExceeded,
    ModelNotFound,
    NotReady,
    OutOfMemory,
    ServeError,
    SettingsError,
    error_from_response,
)

__all__ = [
    "AsyncManagementClient",
    "ManagementClient",
    "ModelState",
    "Tokens",
    "Worker",
    "error_from_reply",
    "names_dead_worker",
    "read_tokens",
    "split_url",
]

Use = Literal["inference", "management"]
_PAGE = 1000  # models per page; far more than fit on a machine
_TIMEOUT_S = 10.0
# TorchServe's messages if a worker died, or exceeded its response timeout and was killed.
_WORKER_DIED = re.compile(rb"worker died|worker.*(disconnect|closed)", re.IGNORECASE)


@dataclass(frozen=True)
class Worker:
    """One Python process of a model.

    Attributes:
        model: name of its model.
        version: version of its model.
        pid: process id; None while it is starting.
        status: TorchServe's status: ``READY``, ``UNLOADING`` (also while it starts), …
    """

    model: str
    version: str
    pid: int | None
    status: str

    @property
    def ready(self) -> bool:
        """Whether it accepts requests."""
        return self.status == "READY"


@dataclass(frozen=True)
class ModelState:
    """State of one version of a model in TorchServe.

    Attributes:
        name: model name.
        version: its version.
        default: whether requests without a version go to this one.
        workers: its workers, unordered.
        response_timeout_s: seconds after which TorchServe kills a worker that has not answered; 0 if not known.
    """

    name: str
    version: str
    default: bool
    workers: tuple[Worker, ...]
    response_timeout_s: int

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids of all workers; 0 for a worker without a process."""
        return tuple(worker.pid or 0 for worker in self.workers)

    @property
    def ready(self) -> int:
        """Number of ready workers."""
        return sum(worker.ready for worker in self.workers)


def split_url(url: str) -> tuple[str, str | None]:
    """Split ``unix:/path`` into the base of URLs and the path of the socket; any other URL has no socket."""
    socket = url.removeprefix("unix:")
    return (url, None) if socket == url else ("http://torchserve", socket)


def read_tokens(key_file: Path) -> dict[str, str]:
    """Read TorchServe's ``key_file.json``; returns the tokens for inference and management by use.

    Raises:
        SettingsError: the file cannot be read or lacks a token.
    """
    try:
        keys = json.loads(key_file.read_text(encoding="utf-8"))
        return {use: str(keys[use]["key"]) for use in ("inference", "management")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SettingsError(
            f"cannot read {key_file} as TorchServe's key_file.json: {type(error).__name__}"
        ) from None


class Tokens:
    """Tokens of a TorchServe that may run in token mode; none without a key file.

    The file is read when it has changed, because TorchServe writes it anew when it starts or issues tokens.
    """

    def __init__(self, key_file: Path | None) -> None:
        self._key_file = key_file
        self._read_at = -1  # time of the last change, nanoseconds
        self._tokens: dict[str, str] = {}

    def refresh(self) -> None:
        """Read the file if it has changed.

        Raises:
            SettingsError: it cannot be read; the tokens read before stay.
        """
        if self._key_file is None:
            return
        try:
            changed_at = self._key_file.stat().st_mtime_ns
        except OSError:
            changed_at = 0
        if changed_at == 0 or changed_at != self._read_at:
            self._tokens = read_tokens(self._key_file)
            self._read_at = changed_at

    def header(self, use: Use) -> dict[str, str]:
        """Return the header that authorizes a call; empty without tokens. An unreadable file changes nothing."""
        with suppress(
            SettingsError
        ):  # TorchServe then rejects the token, and that is an error with a message
            self.refresh()
        return {"authorization": f"Bearer {self._tokens[use]}"} if use in self._tokens else {}


def names_dead_worker(body: bytes) -> bool:
    """Return whether a reply of TorchServe says that the worker with the request died."""
    return _WORKER_DIED.search(body) is not None


def error_from_reply(status: int, body: bytes) -> ServeError:
    """Create the error for a reply of TorchServe itself, not of a model, with a status other than 200."""
    answer = _parse(body)
    message = str(answer.get("message", "")) if isinstance(answer, dict) else ""
    if status in (400, 401, 403) and "token" in message.lower():
        return NotReady("TorchServe rejected the token of this server; retry later")
    if names_dead_worker(body):
        return NotReady("a worker of TorchServe died before it answered; retry later")
    text = body[:200].decode(errors="replace")
    error = error_from_response(status, answer, text)
    if isinstance(error, ModelNotFound | OutOfMemory | NotReady):
        return error
    # Any other rejection concerns this program's own request, not the client's.
    return BackendBroken(f"TorchServe answered {status}: {message or text}")


class ManagementClient:
    """Client that blocks.

    Args:
        url: address of the management API.
        tokens: tokens, if TorchServe checks them.
    """

    def __init__(self, url: str, tokens: Tokens) -> None:
        base_url, socket = split_url(url)
        transport = httpx.HTTPTransport(uds=socket, trust_env=False)
        self._client = httpx.Client(
            base_url=base_url, transport=transport, trust_env=False, timeout=_TIMEOUT_S
        )
        self._tokens = tokens

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def names(self) -> list[str]:
        """List the names of the registered models; errors as of `call`."""
        return _names(self.call("GET", f"/models?limit={_PAGE}"))

    def workers(self, model: str, version: str | None = None) -> list[Worker]:
        """List the workers of one version of a model, or of all; errors as of `call`."""
        entries = self.call("GET", _path(model, version or "all"))
        return [worker for entry in entries for worker in _workers(model, entry)]

    def call(self, method: str, path: str) -> Any:
        """Make a call; returns the parsed JSON.

        Raises:
            ModelNotFound: no such model or version.
            NotReady: TorchServe is not reachable, or rejected the token.
            DeadlineExceeded: no answer within the timeout.
            BackendBroken: TorchServe rejected the call.
        """
        with _map_errors(_TIMEOUT_S):
            reply = self._client.request(method, path, headers=self._tokens.header("management"))
        return _interpret(reply)


class AsyncManagementClient:
    """Client that belongs to an event loop.

    Args:
        url: address of the management API.
        tokens: tokens, if TorchServe checks them.
    """

    def __init__(self, url: str, tokens: Tokens) -> None:
        base_url, socket = split_url(url)
        transport = httpx.AsyncHTTPTransport(uds=socket, trust_env=False)
        self._client = httpx.AsyncClient(base_url=base_url, transport=transport, trust_env=False)
        self._tokens = tokens

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def states(self, timeout_s: float) -> list[ModelState]:
        """List all versions of all registered models; errors as of `get`."""
        found: list[ModelState] = []
        for name in _names(await self.get(f"/models?limit={_PAGE}", timeout_s)):
            try:
                default = await self.get(_path(name), timeout_s)
                versions = await self.get(_path(name, "all"), timeout_s)
            except ModelNotFound:
                continue  # unregistered meanwhile
            with _map_format_errors(name):
                found.extend(_state(name, entry, default[0]["modelVersion"]) for entry in versions)
        return found

    async def workers(self, model: str, version: str, timeout_s: float) -> list[Worker]:
        """List the workers of one version of a model; errors as of `get`."""
        entries = await self.get(_path(model, version), timeout_s)
        with _map_format_errors(model):
            return _workers(model, entries[0])

    async def description(self, model: str, version: str, timeout_s: float) -> Any:
        """Ask a worker for the description of its archive; None without one. Errors as of `get`."""
        entries = await self.get(_path(model, version) + "?customized=true", timeout_s)
        with _map_format_errors(model):
            document = entries[0].get("customizedMetadata")
        return _parse(document) if isinstance(document, str) else document

    async def get(self, path: str, timeout_s: float) -> Any:
        """Read a resource; returns the parsed JSON.

        Raises:
            ModelNotFound: no such model or version.
            NotReady: TorchServe is not reachable, or rejected the token.
            DeadlineExceeded: no answer within the timeout.
            BackendBroken: TorchServe rejected the call, or its answer has an unknown format.
        """
        with _map_errors(timeout_s):
            reply = await self._client.get(path, headers=self._tokens.header("management"), timeout=timeout_s)
        return _interpret(reply)


def _path(model: str, version: str | None = None) -> str:
    return f"/models/{quote(model, safe='')}" + (f"/{quote(version, safe='')}" if version else "")


def _names(answer: Any) -> list[str]:
    with _map_format_errors(""):
        return [str(entry["modelName"]) for entry in answer["models"]]


def _state(name: str, entry: Mapping[str, Any], default: str) -> ModelState:
    return ModelState(
        name=name,
        version=str(entry["modelVersion"]),
        default=entry["modelVersion"] == default,
        workers=tuple(_workers(name, entry)),
        response_timeout_s=max(0, int(entry.get("responseTimeout") or 0)),
    )


def _workers(name: str, entry: Mapping[str, Any]) -> list[Worker]:
    with _map_format_errors(name):
        return [
            Worker(
                name, str(entry["modelVersion"]), int(worker.get("pid") or 0) or None, str(worker["status"])
            )
            for worker in entry["workers"]
        ]


def _interpret(reply: httpx.Response) -> Any:
    answer = _parse(reply.content)
    if reply.status_code == httpx.codes.NOT_FOUND:
        raise ModelNotFound(str(answer.get("message")) if isinstance(answer, dict) else "no such model")
    if not reply.is_success or answer is None:
        raise error_from_reply(reply.status_code, reply.content)
    return answer


@contextmanager
def _map_errors(timeout_s: float) -> Iterator[None]:
    try:
        yield
    except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as error:
        raise NotReady("cannot connect to TorchServe's management port; retry later") from error
    except httpx.TimeoutException as error:
        raise DeadlineExceeded(
            f"TorchServe's management port did not answer within {timeout_s:g} s"
        ) from error
    except httpx.HTTPError as error:
        raise NotReady(f"lost the connection to TorchServe's management port: {error}") from error


@contextmanager
def _map_format_errors(name: str) -> Iterator[None]:
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise BackendBroken(
            f"TorchServe's description of model {name} has an unknown format: {error}"
        ) from None


def _parse(body: str | bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None

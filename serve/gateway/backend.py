"""TorchServe client of the gateway: sends batches of frames, returns one outcome per frame, reads the model states.

A batch is one message (`serve.protocol.batch`). It goes to the socket of a worker if one can be reached
(`serve.gateway.worker_client`), else to TorchServe by POST; TorchServe's own batching stays off. All failures of
TorchServe, its workers and httpx become errors of `serve.errors` here. A batch whose worker died is sent once more,
one that ran out of memory is split, both without cancelled frames; nothing else is retried. No other module of the
gateway knows that the backend is TorchServe.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
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
from serve.gateway.http_pool import ConnectFailed, ConnectionLost, ConnectionPool
from serve.gateway.worker_client import WorkerLost, WorkerSockets
from serve.protocol.batch import (
    FRAMES_CONTENT_TYPE,
    OUTCOMES_CONTENT_TYPE,
    Body,
    Bytes,
    frame_chunks,
    unpack_outcomes,
)

__all__ = ["Answer", "EncodedFrame", "ModelState", "TorchServeBackend"]

logger = logging.getLogger(__name__)
# TorchServe's messages if a worker died, or exceeded its response timeout and was killed.
_WORKER_DIED = re.compile(r"worker died|worker.*(disconnect|closed)", re.IGNORECASE)
_STATE_TIMEOUT_S = 1.5  # below the 2 s within which readiness must report a hung server
_DESCRIBE_TIMEOUT_S = 10.0
# Polling while waiting for TorchServe to notice a dead worker; mostly the first poll succeeds.
_POLL_S = 0.05
_MAX_POLLS = 60
_PAGE = 1000  # models per page of the management API; far more than fit on a machine


@dataclass
class EncodedFrame:
    """One frame as it was received.

    Attributes:
        body: its bytes, or those of its parts by name.
        options: options of the frame (`serve.protocol.frames.FrameOptions`), not yet parsed.
        cancelled: set once the caller has given up; a cancelled frame is not sent again.
    """

    body: Body
    options: Mapping[str, Any] = field(default_factory=dict)
    cancelled: bool = False


@dataclass(frozen=True)
class Answer:
    """Answer to one frame.

    Attributes:
        body: JSON, as the worker wrote it.
        seconds: duration of each stage of the whole batch in the worker.
    """

    body: Bytes
    seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelState:
    """State of one version of a model in TorchServe.

    Attributes:
        name: model name.
        version: its version.
        default: whether requests without a version go to this one.
        workers: process ids of all its workers (0 for a worker without a process), unordered.
        ready: number of ready workers.
        response_timeout_s: seconds after which TorchServe kills a worker that has not answered.
    """

    name: str
    version: str
    default: bool
    workers: tuple[int, ...]
    ready: int
    response_timeout_s: int


class TorchServeBackend:
    """Client of one TorchServe with its connections; belongs to one event loop.

    Args:
        inference_url: address of the inference API.
        management_url: address of the management API.
        key_file: TorchServe's ``key_file.json`` if it checks tokens; read again when a token is rejected.
        timeout_s: timeout of a batch, seconds; longer than TorchServe's response timeout of a worker.
        worker_sockets: folder with the sockets of its workers, if reachable from here.
    """

    def __init__(
        self,
        inference_url: str,
        management_url: str,
        *,
        key_file: Path | None = None,
        timeout_s: float = 130.0,
        worker_sockets: Path | None = None,
    ) -> None:
        self._timeout_s = timeout_s
        self._sockets = None if worker_sockets is None else WorkerSockets(worker_sockets)
        self._states: dict[tuple[str, str], ModelState] = {}
        self._predict = ConnectionPool(inference_url)
        self._manage = httpx.AsyncClient(base_url=management_url, trust_env=False)
        self._key_file = key_file
        self._tokens: dict[str, str] = {} if key_file is None else _read_tokens(key_file)

    async def close(self) -> None:
        """Close all connections."""
        self._predict.close()
        if self._sockets is not None:
            self._sockets.close()
        await self._manage.aclose()

    # Predictions

    async def run(self, name: str, version: str, frames: Sequence[EncodedFrame]) -> list[Answer | Exception]:
        """Send a batch; returns one outcome per frame, in order. Cancelled frames are not sent.

        Raises:
            NotReady: TorchServe is not reachable, has no worker, or lost a worker with this batch twice.
            DeadlineExceeded: no answer within the timeout.
            BackendBroken: the answer is not one of a handler of this project.
        """
        answers: dict[int, Answer | Exception] = {}
        for attempt in (1, 2):
            positions = [i for i, frame in enumerate(frames) if not frame.cancelled]
            if not positions:
                break
            batch = [frames[i] for i in positions]
            try:
                outcomes = await self._send(name, version, batch)
            except _WorkerDied as death:
                if attempt == 2:
                    raise NotReady(f"a worker of {name} died twice with this batch; retry later") from None
                logger.warning(
                    "a worker of %s %s died with a batch of %d; sending it again", name, version, len(batch)
                )
                if death.pid is not None:
                    await self._wait_until_noticed(name, version, death.pid)
                continue
            except OutOfMemory as error:
                if len(batch) > 1:
                    outcomes = await self._split(name, version, batch)
                elif attempt == 2 or not isinstance(error, _WorkerKilled):
                    outcomes = [error]
                else:
                    logger.warning(
                        "a worker of %s %s was killed with a frame; sending it again", name, version
                    )
                    continue
            answers.update(zip(positions, outcomes, strict=True))
            break
        return [
            answers[i] if i in answers else NotReady("the frame was cancelled") for i in range(len(frames))
        ]

    async def _split(
        self, name: str, version: str, frames: Sequence[EncodedFrame]
    ) -> list[Answer | Exception]:
        logger.warning(
            "a batch of %d frames for %s %s ran out of memory; splitting it", len(frames), name, version
        )
        half = len(frames) // 2
        first = await self.run(name, version, frames[:half])
        return [*first, *await self.run(name, version, frames[half:])]

    async def _send(
        self, name: str, version: str, frames: Sequence[EncodedFrame]
    ) -> list[Answer | Exception]:
        chunks = frame_chunks([(frame.body, frame.options) for frame in frames])
        body: Bytes | None = None
        if self._sockets is not None and (seen := self._states.get((name, version))):
            with self._map_errors(f"a worker of {name}", self._timeout_s):
                workers = [pid for pid in seen.workers if pid]
                body = await self._sockets.call(workers, chunks, self._timeout_s, seen.response_timeout_s)
        outcomes = unpack_outcomes(body or await self._post(name, version, chunks))
        if len(outcomes.items) != len(frames):
            raise BackendBroken(f"a worker of {name} answered {len(outcomes.items)} of {len(frames)} frames")
        return [
            Answer(body, outcomes.seconds) if status == 200 else error_from_response(status, _json(body))
            for status, body in outcomes.items
        ]

    async def _post(self, name: str, version: str, chunks: Sequence[Bytes]) -> Bytes:
        """Send a framed batch through TorchServe; returns framed outcomes."""
        path = f"/predictions/{quote(name, safe='')}/{quote(version, safe='')}"
        headers = {"content-type": FRAMES_CONTENT_TYPE, "accept": OUTCOMES_CONTENT_TYPE}
        with self._map_errors("TorchServe", self._timeout_s):
            reply = await self._predict.post(path, headers | self._auth("inference"), chunks, self._timeout_s)
        if reply.status != 200:
            raise self._error_from_reply(reply.status, reply.body)
        if reply.headers.get("content-type") != OUTCOMES_CONTENT_TYPE:
            raise BackendBroken(
                f"model {name} {version} was not packed by mmdet3d-serve: it answers with Content-Type "
                f"{reply.headers.get('content-type')!r}; make its archive with `mmdet3d-serve archive`"
            )
        return reply.body

    def _error_from_reply(self, status: int, body: bytes) -> ServeError:
        """Error for a status other than 200."""
        answer = _json(body)
        text = body[:200].decode(errors="replace")
        message = str(answer.get("message", "")) if isinstance(answer, dict) else ""
        if status == 500 and _WORKER_DIED.search(message):
            return _WorkerDied(message)
        if status == 507 and _WORKER_DIED.search(message):
            return _WorkerKilled(
                "a worker was killed with this frame, most often for lack of memory; send a smaller frame"
            )
        if self._key_file is not None and status in (400, 401, 403) and "token" in message.lower():
            try:
                self._tokens = _read_tokens(self._key_file)
            except SettingsError as cause:
                logger.error("TorchServe rejected the gateway's token; cannot read a new one: %s", cause)
            return NotReady("TorchServe rejected the gateway's token, which was read again; retry later")
        error = error_from_response(status, answer, text)
        if isinstance(error, ModelNotFound | OutOfMemory | NotReady):
            return error
        # Any other rejection concerns the gateway's own request, not the client's.
        return BackendBroken(f"TorchServe answered {status}: {message or text}")

    async def _wait_until_noticed(self, name: str, version: str, pid: int) -> None:
        """Wait until TorchServe has noticed that a worker died.

        Before that it still passes batches to the dead worker, and the failure would count as a second death.
        """
        for _ in range(_MAX_POLLS):
            try:
                (entry,) = await self._get(f"/models/{quote(name, safe='')}/{quote(version, safe='')}")
            except DeadlineExceeded:  # predictions do not depend on the management port
                return
            if pid not in _ready_workers(name, entry):
                return
            await asyncio.sleep(_POLL_S)
        logger.warning("worker %d of %s %s closed a connection but is still alive", pid, name, version)

    # States

    async def models(self) -> list[ModelState]:
        """List all versions of all registered models.

        Raises:
            NotReady: TorchServe is not reachable.
            DeadlineExceeded: no answer within the timeout.
            BackendBroken: the answer has an unknown format.
        """
        listed = await self._get(f"/models?limit={_PAGE}")
        found: list[ModelState] = []
        for entry in listed["models"]:
            name = str(entry["modelName"])
            path = f"/models/{quote(name, safe='')}"
            try:
                default = (await self._get(path))[0]["modelVersion"]
                found.extend(_state(name, version, default) for version in await self._get(f"{path}/all"))
            except ModelNotFound:
                continue  # unregistered meanwhile
        self._states = {(state.name, state.version): state for state in found}
        if self._sockets is not None:
            self._sockets.retain({pid for state in found for pid in state.workers})
        return found

    async def describe(self, name: str, version: str) -> dict[str, Any]:
        """Ask a worker for the description of its archive; waits for a free worker.

        Raises:
            BackendBroken: the model was not packed by this project.
            NotReady: TorchServe is not reachable.
            DeadlineExceeded: no answer within the timeout.
        """
        path = f"/models/{quote(name, safe='')}/{quote(version, safe='')}?customized=true"
        (entry,) = await self._get(path, timeout_s=_DESCRIBE_TIMEOUT_S)
        metadata = entry.get("customizedMetadata")
        document = _json(metadata) if isinstance(metadata, str) else metadata
        if not isinstance(document, dict) or "modality" not in document:
            raise BackendBroken(
                f"model {name} {version} was not packed by mmdet3d-serve: it has no description; make its archive with "
                "`mmdet3d-serve archive`"
            )
        return document

    async def _get(self, path: str, timeout_s: float = _STATE_TIMEOUT_S) -> Any:
        with self._map_errors("TorchServe's management port", timeout_s):
            response = await self._manage.get(path, headers=self._auth("management"), timeout=timeout_s)
        answer = _json(response.content)
        if response.status_code == 404:
            raise ModelNotFound(str(answer.get("message")) if isinstance(answer, dict) else "no such model")
        if response.status_code != 200 or answer is None:
            raise self._error_from_reply(response.status_code, response.content)
        return answer

    def _auth(self, use: str) -> dict[str, str]:
        return {"authorization": f"Bearer {self._tokens[use]}"} if use in self._tokens else {}

    @contextmanager
    def _map_errors(self, what: str, timeout_s: float) -> Iterator[None]:
        """Map exceptions of httpx and the connection pools to errors of `serve.errors`."""
        try:
            yield
        except (ConnectFailed, httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as error:
            raise NotReady(f"cannot connect to {what}; retry later") from error
        except (TimeoutError, httpx.TimeoutException) as error:
            raise DeadlineExceeded(f"{what} did not answer within {timeout_s:g} s") from error
        except (ConnectionLost, httpx.TransportError) as error:
            # Lost before the answer was complete: the process died, and may be back at once.
            pid = error.pid if isinstance(error, WorkerLost) else None
            raise _WorkerDied(f"lost the connection to {what}: {error}", pid) from error


class _WorkerDied(NotReady):
    """The worker died with the batch; another one may take it. `pid` is set if TorchServe may not have noticed yet."""

    def __init__(self, message: str, pid: int | None = None) -> None:
        super().__init__(message)
        self.pid = pid


class _WorkerKilled(OutOfMemory):
    """The worker was killed from outside (exit code 137, TorchServe 0.12 answers 507), most often for its memory."""


def _state(name: str, version: Mapping[str, Any], default: str) -> ModelState:
    with _map_format_errors(name):
        return ModelState(
            name=name,
            version=str(version["modelVersion"]),
            default=version["modelVersion"] == default,
            workers=tuple(_pid(worker) for worker in version["workers"]),
            ready=len(_ready_workers(name, version)),
            response_timeout_s=max(0, int(version.get("responseTimeout") or 0)),
        )


def _ready_workers(name: str, version: Mapping[str, Any]) -> list[int]:
    with _map_format_errors(name):
        return [_pid(worker) for worker in version["workers"] if worker["status"] == "READY"]


def _pid(worker: Mapping[str, Any]) -> int:
    return int(worker.get("pid") or 0)


@contextmanager
def _map_format_errors(name: str) -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BackendBroken(
            f"TorchServe's description of model {name} has an unknown format: {error}"
        ) from None


def _read_tokens(path: Path) -> dict[str, str]:
    try:
        keys = json.loads(path.read_text())
        return {use: str(keys[use]["key"]) for use in ("inference", "management")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SettingsError(
            f"cannot read {path} as TorchServe's key_file.json: {type(error).__name__}"
        ) from None


def _json(body: Any) -> Any:
    try:
        return json.loads(bytes(body) if isinstance(body, memoryview) else body)
    except ValueError:
        return None

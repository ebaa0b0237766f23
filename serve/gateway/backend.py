"""The gateway's one door to TorchServe: a batch of frames there, an outcome per frame back.

One message carries a whole batch (`serve.protocol.batch`): to a socket of a worker of TorchServe's where there is one
(`serve.gateway.worker_client`), else a POST to TorchServe, whose own batching stays off. Everything TorchServe, its workers
and httpx can do wrong becomes an error of ours here and nowhere else. A batch whose worker died is sent once
more, one that was out of memory is halved, without those frames that nobody waits for any more; nothing else is
retried. Knows nothing about queues, FastAPI or what is in a frame; nothing outside this module knows that the
backend is TorchServe.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx

from serve.client import error_from_answer
from serve.errors import (
    BackendBroken,
    DeadlineExceeded,
    ModelNotFound,
    NotReady,
    OutOfMemory,
    ServeError,
    SettingsError,
)
from serve.gateway.http_pool import BrokenOff, Connections, Unreachable
from serve.gateway.worker_client import LostWithBatch, WorkerSockets
from serve.protocol.batch import (
    FRAMES_CONTENT_TYPE,
    OUTCOMES_CONTENT_TYPE,
    Body,
    Bytes,
    frame_chunks,
    unpack_outcomes,
)

__all__ = ["Answer", "Frame", "ModelState", "TorchServeBackend"]

logger = logging.getLogger(__name__)
# TorchServe's words when the process that had the batch is gone, or was too slow and was killed.
_WORKER_DIED = re.compile(r"worker died|worker.*(disconnect|closed)", re.IGNORECASE)
# Questions of state are answered at once or not at all: a server that hangs must show within 2 s.
_STATE_TIMEOUT_S = 1.5
# How often TorchServe is asked whether it knows by now that a worker died; the first answer is a yes most often.
_NOTICE_S = 0.05
_NOTICES = 60
_PAGE = 1000  # models per page of the management API; far more than fit a machine


@dataclass
class Frame:
    """One frame as it is sent on: its bytes (or those of its parts, by name), its options, and if anyone waits for it.

    Whoever waits for it says so when he no longer does; it is not sent again then.
    """

    body: Body
    options: Mapping[str, Any] = field(default_factory=dict)
    wanted: bool = True


@dataclass(frozen=True)
class Answer:
    """What one frame came to: the worker's JSON, as it is, and what the worker spent on the whole call, seconds."""

    body: Bytes
    seconds: Mapping[str, float] = field(default_factory=dict)


Outcomes = list[Answer | Exception]


@dataclass(frozen=True)
class ModelState:
    """One version of a model as TorchServe has it now.

    Attributes:
        name: model name.
        version: its version.
        default: whether a request without a version means this one.
        workers: process ids of all its workers (0 for one without a process), in no order.
        ready: how many of them are ready.
        response_timeout_s: seconds after which TorchServe ends a worker that has not answered.
    """

    name: str
    version: str
    default: bool
    workers: tuple[int, ...]
    ready: int
    response_timeout_s: int


class TorchServeBackend:
    """A connection pool to one TorchServe; belongs to one event loop.

    Args:
        inference_url: where predictions are asked for.
        management_url: where models are asked about.
        key_file: TorchServe's ``key_file.json`` where it runs in token mode; read anew when a token is refused.
        timeout_s: seconds to wait for a batch; TorchServe's own limit on a worker should be shorter.
        worker_sockets: folder with the sockets of its workers, where it can be reached from here.
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
        self._direct = None if worker_sockets is None else WorkerSockets(worker_sockets)
        self._seen: dict[tuple[str, str], ModelState] = {}
        self._predict = Connections(inference_url)
        self._manage = httpx.AsyncClient(base_url=management_url, trust_env=False)
        self._key_file = key_file
        self._tokens: dict[str, str] = {} if key_file is None else _read_tokens(key_file)

    async def close(self) -> None:
        """Close all connections."""
        self._predict.close()
        if self._direct is not None:
            self._direct.close()
        await self._manage.aclose()

    # Predictions

    async def run(self, name: str, version: str, frames: Sequence[Frame]) -> Outcomes:
        """One outcome per frame, in order; frames that nobody waits for any more are not sent, or not again.

        Raises:
            NotReady: TorchServe is gone, has no worker, or lost the worker of this batch twice.
            DeadlineExceeded: no answer within the time limit.
            BackendBroken: an answer that is not one of ours.
        """
        return await self._those_wanted(frames, partial(self._first, name, version))

    async def _first(self, name: str, version: str, frames: Sequence[Frame]) -> Outcomes:
        try:
            return await self._once(name, version, frames)
        except _WorkerDied as death:
            logger.warning(
                "a worker of %s %s died with a batch of %d; sending it again", name, version, len(frames)
            )
            if death.pid is not None:
                await self._noticed(name, version, death.pid)
        except OutOfMemory as error:
            if len(frames) > 1:
                return await self._halved(name, version, frames)
            if not isinstance(error, _WorkerKilled):
                return [error]
            logger.warning("a worker of %s %s was killed with a frame; sending it again", name, version)
        return await self._those_wanted(frames, partial(self._second, name, version))

    async def _second(self, name: str, version: str, frames: Sequence[Frame]) -> Outcomes:
        try:
            return await self._once(name, version, frames)
        except _WorkerDied:
            raise NotReady(f"a worker of {name} died twice with this batch; retry later") from None
        except OutOfMemory as error:
            return [error] if len(frames) == 1 else await self._halved(name, version, frames)

    async def _halved(self, name: str, version: str, frames: Sequence[Frame]) -> Outcomes:
        logger.warning("a batch of %d frames is too much for %s %s; halving it", len(frames), name, version)
        half = len(frames) // 2
        first = await self.run(name, version, frames[:half])
        return [*first, *await self.run(name, version, frames[half:])]

    async def _those_wanted(
        self, frames: Sequence[Frame], send: Callable[[Sequence[Frame]], Awaitable[Outcomes]]
    ) -> Outcomes:
        """Outcomes of those frames that somebody waits for; of the others, that nobody does."""
        wanted = [frame.wanted for frame in frames]
        left = [frame for frame in frames if frame.wanted]
        answers = iter(await send(left) if left else ())
        return [next(answers) if wait else NotReady("nobody waits for this frame") for wait in wanted]

    async def _once(self, name: str, version: str, frames: Sequence[Frame]) -> Outcomes:
        chunks = frame_chunks([(frame.body, frame.options) for frame in frames])
        body: Bytes | None = None
        if self._direct is not None and (seen := self._seen.get((name, version))):
            with self._mapped(f"a worker of {name}", self._timeout_s):
                workers = [pid for pid in seen.workers if pid]
                body = await self._direct.ask(workers, chunks, self._timeout_s, seen.response_timeout_s)
        outcomes = unpack_outcomes(body or await self._through_torchserve(name, version, chunks))
        if len(outcomes.items) != len(frames):
            raise BackendBroken(f"a worker of {name} answered {len(outcomes.items)} of {len(frames)} frames")
        return [
            Answer(body, outcomes.seconds) if status == 200 else error_from_answer(status, _json(body))
            for status, body in outcomes.items
        ]

    async def _through_torchserve(self, name: str, version: str, chunks: Sequence[Bytes]) -> Bytes:
        """The framed outcomes of a framed batch."""
        path = f"/predictions/{quote(name, safe='')}/{quote(version, safe='')}"
        headers = {"content-type": FRAMES_CONTENT_TYPE, "accept": OUTCOMES_CONTENT_TYPE}
        with self._mapped("TorchServe", self._timeout_s):
            reply = await self._predict.post(path, headers | self._auth("inference"), chunks, self._timeout_s)
        if reply.status != 200:
            raise self._refusal(reply.status, reply.body)
        if reply.headers.get("content-type") != OUTCOMES_CONTENT_TYPE:
            raise BackendBroken(
                f"model {name} {version} is not one of ours: it answers {reply.headers.get('content-type')!r}; "
                "make its archive with `make archive`"
            )
        return reply.body

    def _refusal(self, status: int, body: bytes) -> ServeError:
        """What a status other than 200 stands for."""
        answer = _json(body)
        text = body[:200].decode(errors="replace")
        said = str(answer.get("message", "")) if isinstance(answer, dict) else ""
        if status == 500 and _WORKER_DIED.search(said):
            return _WorkerDied(said)
        if status == 507 and _WORKER_DIED.search(said):
            return _WorkerKilled(
                "a worker was killed with this frame, as when memory runs out; send a smaller one"
            )
        if self._key_file is not None and status in (400, 401, 403) and "token" in said.lower():
            try:
                self._tokens = _read_tokens(self._key_file)
            except SettingsError as unread:
                logger.error(
                    "TorchServe refused the gateway's token, and a new one cannot be read: %s", unread
                )
            return NotReady("TorchServe refused the gateway's token; it is read anew, retry later")
        error = error_from_answer(status, answer, text)
        if isinstance(error, ModelNotFound | OutOfMemory | NotReady):
            return error
        # Whatever else TorchServe refuses of what the gateway sends is not the client's mistake.
        return BackendBroken(f"TorchServe answered {status}: {said or text}")

    async def _noticed(self, name: str, version: str, pid: int) -> None:
        """Wait until TorchServe knows of a death that only the gateway has seen.

        Until then it hands a batch to the dead worker, and its answer would pass for a second death.
        """
        for _ in range(_NOTICES):
            try:
                (entry,) = await self._ask(f"/models/{quote(name, safe='')}/{quote(version, safe='')}")
            except DeadlineExceeded:  # a slow management port stops no prediction
                return
            if pid not in _ready_workers(name, entry):
                return
            await asyncio.sleep(_NOTICE_S)
        logger.warning("TorchServe takes worker %d of %s %s for alive; it only hung up", pid, name, version)

    # State

    async def models(self) -> list[ModelState]:
        """Every version of every model that is registered now.

        Raises:
            NotReady: TorchServe does not answer.
            BackendBroken: it answers something else.
        """
        listed = await self._ask(f"/models?limit={_PAGE}")
        found: list[ModelState] = []
        for entry in listed["models"]:
            name = str(entry["modelName"])
            path = f"/models/{quote(name, safe='')}"
            try:
                default = (await self._ask(path))[0]["modelVersion"]
                found.extend(_state(name, version, default) for version in await self._ask(f"{path}/all"))
            except ModelNotFound:
                continue  # removed since it was listed
        self._seen = {(state.name, state.version): state for state in found}
        if self._direct is not None:
            self._direct.follow({pid for state in found for pid in state.workers})
        return found

    async def describe(self, name: str, version: str) -> dict[str, Any]:
        """What a model's handler says of its archive; waits for a worker that is free.

        Raises:
            BackendBroken: the model is not one of ours.
            NotReady: TorchServe does not answer, or not in time.
        """
        path = f"/models/{quote(name, safe='')}/{quote(version, safe='')}?customized=true"
        (entry,) = await self._ask(path, timeout_s=10.0)
        said = entry.get("customizedMetadata")
        document = _json(said) if isinstance(said, str) else said
        if not isinstance(document, dict) or "modality" not in document:
            raise BackendBroken(
                f"model {name} {version} does not describe itself as ours do; make its archive with `make archive`"
            )
        return document

    async def _ask(self, path: str, timeout_s: float = _STATE_TIMEOUT_S) -> Any:
        with self._mapped("TorchServe's management port", timeout_s):
            response = await self._manage.get(path, headers=self._auth("management"), timeout=timeout_s)
        answer = _json(response.content)
        if response.status_code == 404:
            raise ModelNotFound(str(answer.get("message")) if isinstance(answer, dict) else "no such model")
        if response.status_code != 200 or answer is None:
            raise self._refusal(response.status_code, response.content)
        return answer

    def _auth(self, use: str) -> dict[str, str]:
        return {"authorization": f"Bearer {self._tokens[use]}"} if use in self._tokens else {}

    @contextmanager
    def _mapped(self, what: str, timeout_s: float) -> Iterator[None]:
        """Exceptions of httpx and of connections → ours."""
        try:
            yield
        except (Unreachable, httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as error:
            raise NotReady(f"{what} does not answer; retry later") from error
        except (TimeoutError, httpx.TimeoutException) as error:
            raise DeadlineExceeded(f"{what} gave no answer within {timeout_s:g} s") from error
        except (BrokenOff, httpx.TransportError) as error:
            # Broken off in mid-answer: the server went, and may be back at once.
            pid = error.pid if isinstance(error, LostWithBatch) else None
            raise _WorkerDied(f"the connection to {what} broke off: {error}", pid) from error


class _WorkerDied(NotReady):
    """The process that had the batch is gone; another may take it. `pid` is told where TorchServe may not know yet."""

    def __init__(self, message: str, pid: int | None = None) -> None:
        super().__init__(message)
        self.pid = pid


class _WorkerKilled(OutOfMemory):
    """It was killed from outside (exit code 137, which TorchServe 0.12 answers with 507): most often for its memory."""


def _state(name: str, version: Mapping[str, Any], default: str) -> ModelState:
    with _known(name):
        return ModelState(
            name=name,
            version=str(version["modelVersion"]),
            default=version["modelVersion"] == default,
            workers=tuple(_pid(worker) for worker in version["workers"]),
            ready=len(_ready_workers(name, version)),
            response_timeout_s=max(0, int(version.get("responseTimeout") or 0)),
        )


def _ready_workers(name: str, version: Mapping[str, Any]) -> list[int]:
    with _known(name):
        return [_pid(worker) for worker in version["workers"] if worker["status"] == "READY"]


def _pid(worker: Mapping[str, Any]) -> int:
    return int(worker.get("pid") or 0)


@contextmanager
def _known(name: str) -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BackendBroken(f"TorchServe describes model {name} in a way we do not know: {error}") from None


def _read_tokens(path: Path) -> dict[str, str]:
    try:
        keys = json.loads(path.read_text())
        return {use: str(keys[use]["key"]) for use in ("inference", "management")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SettingsError(f"{path} is not TorchServe's key_file.json: {type(error).__name__}") from None


def _json(body: Any) -> Any:
    try:
        return json.loads(bytes(body) if isinstance(body, memoryview) else body)
    except ValueError:
        return None

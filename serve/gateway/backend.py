"""TorchServe client of the gateway: sends batches of frames, returns one outcome per frame, reads the model states.

A batch is one message (`serve.protocol.worker`). It goes to the socket of a worker if one can be reached
(`serve.gateway.worker_client`), else to TorchServe by POST; TorchServe's own batching stays off. All failures of
TorchServe, its workers and httpx become errors of `serve.errors` here. A batch whose worker died is sent once more,
then frame by frame; one that ran out of memory is split, both without cancelled frames; nothing else is retried. No
other module of the gateway knows that the backend is TorchServe.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx

from serve.errors import (
    BackendBroken,
    DeadlineExceeded,
    NotReady,
    OutOfMemory,
    ServeError,
    error_from_response,
)
from serve.gateway.batcher import Job
from serve.gateway.worker_client import WorkerLost, WorkerSockets
from serve.protocol.batch import (
    FRAMES_CONTENT_TYPE,
    OUTCOMES_CONTENT_TYPE,
    Bytes,
    unpack_outcomes,
)
from serve.protocol.worker import EncodedFrame, batch_chunks
from serve.torchserve.management import (
    AsyncManagementClient,
    ModelState,
    Tokens,
    error_from_reply,
    names_dead_worker,
)

__all__ = ["Answer", "ModelState", "TorchServeBackend"]

logger = logging.getLogger(__name__)
_STATE_TIMEOUT_S = 1.5  # below the 2 s within which readiness must report a hung server
_DESCRIBE_TIMEOUT_S = 10.0
# Polling while waiting for TorchServe to notice a dead worker; mostly the first poll succeeds.
_POLL_S = 0.05
_MAX_POLLS = 60
_CONNECT_TIMEOUT_S = 2.0


@dataclass(frozen=True)
class Answer:
    """Answer to one frame.

    Attributes:
        body: JSON, as the worker wrote it.
        seconds: duration of each stage of the whole batch in the worker.
    """

    body: Bytes
    seconds: Mapping[str, float] = field(default_factory=dict)


FrameJob = Job[EncodedFrame, Answer]


class TorchServeBackend:
    """Client of one TorchServe with its connections; belongs to one event loop.

    Args:
        inference_url: address of the inference API.
        management_url: address of the management API.
        key_file: TorchServe's ``key_file.json`` if it checks tokens.
        timeout_s: timeout of a batch, seconds; longer than TorchServe's response timeout of a worker.
        worker_sockets: folder with the sockets of its workers, if reachable from here.

    Raises:
        SettingsError: `key_file` cannot be read.
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
        # Called with name, version and a worker's counts of a batch, once its outcomes are on their way.
        self.on_observed: Callable[[str, str, Mapping[str, Any]], None] = lambda name, version, observed: None
        self._timeout_s = timeout_s
        self._sockets = None if worker_sockets is None else WorkerSockets(worker_sockets)
        self._states: dict[tuple[str, str], ModelState] = {}
        self._tokens = Tokens(key_file)
        self._tokens.refresh()
        self._management = AsyncManagementClient(management_url, self._tokens)
        self._inference = httpx.AsyncClient(
            base_url=inference_url,
            trust_env=False,
            timeout=httpx.Timeout(timeout_s, connect=_CONNECT_TIMEOUT_S),
            limits=httpx.Limits(max_connections=None, keepalive_expiry=60.0),
        )

    async def close(self) -> None:
        """Close all connections."""
        if self._sockets is not None:
            self._sockets.close()
        await self._inference.aclose()
        await self._management.close()

    # Predictions

    async def run(self, name: str, version: str, jobs: Sequence[FrameJob]) -> list[Answer | Exception]:
        """Send a batch; returns one outcome per job, in order. Cancelled jobs are not sent.

        Raises:
            NotReady: TorchServe is not reachable, has no worker, or lost a worker twice.
            DeadlineExceeded: no answer within the timeout.
            BackendBroken: the answer is not one of a handler of this project.
        """
        outcomes = await self._run(name, version, jobs)
        return [outcomes.get(job) or NotReady("the frame was cancelled") for job in jobs]

    async def _run(
        self, name: str, version: str, jobs: Sequence[FrameJob], attempts: int = 2
    ) -> dict[FrameJob, Answer | Exception]:
        for attempt in range(1, attempts + 1):
            jobs = [job for job in jobs if not job.cancelled]
            if not jobs:
                return {}
            try:
                return await self._send(name, version, jobs)
            except _WorkerDied as death:
                logger.warning("a worker of %s %s died with %d frames", name, version, len(jobs))
                if death.pid is not None:
                    await self._wait_until_noticed(name, version, death.pid)
            except OutOfMemory as error:
                if len(jobs) > 1:
                    logger.warning(
                        "a batch of %d frames for %s ran out of memory; splitting it", len(jobs), name
                    )
                    half = len(jobs) // 2
                    first = await self._run(name, version, jobs[:half])
                    return first | await self._run(name, version, jobs[half:])
                if attempt == attempts or not isinstance(error, _WorkerKilled):
                    return {jobs[0]: error}
                logger.warning("a worker of %s %s was killed with a frame; sending it again", name, version)
        if len(jobs) > 1:
            return await self._run_each(name, version, jobs)
        raise NotReady(f"a worker of {name} died twice with this frame; retry later")

    async def _run_each(
        self, name: str, version: str, jobs: Sequence[FrameJob]
    ) -> dict[FrameJob, Answer | Exception]:
        """Send frames one by one, once, after two deaths: one of them that ends every worker must fail alone."""
        logger.warning("%d frames for %s %s ended two workers; sending each alone", len(jobs), name, version)
        outcomes: dict[FrameJob, Answer | Exception] = {}
        for job in jobs:
            try:
                outcomes |= await self._run(name, version, [job], attempts=1)
            except ServeError as error:
                outcomes[job] = error
        return outcomes

    async def _send(
        self, name: str, version: str, jobs: Sequence[FrameJob]
    ) -> dict[FrameJob, Answer | Exception]:
        chunks = batch_chunks([job.item for job in jobs])
        body: Bytes | None = None
        if self._sockets is not None and (seen := self._states.get((name, version))):
            with self._map_errors(f"a worker of {name}"):
                pids = [pid for pid in seen.pids if pid]
                waiting = [job.answer for job in jobs]
                body = await self._sockets.call(
                    pids, chunks, self._timeout_s, seen.response_timeout_s, waiting
                )
        outcomes = unpack_outcomes(body or await self._post(name, version, chunks))
        if len(outcomes.items) != len(jobs):
            raise BackendBroken(f"a worker of {name} answered {len(outcomes.items)} of {len(jobs)} frames")
        if outcomes.observed is not None:
            asyncio.get_running_loop().call_soon(self.on_observed, name, version, outcomes.observed)
        return {
            job: Answer(body, outcomes.seconds) if status == 200 else _frame_error(status, body)
            for job, (status, body) in zip(jobs, outcomes.items, strict=True)
        }

    async def _post(self, name: str, version: str, chunks: Sequence[Bytes]) -> Bytes:
        """Send a framed batch through TorchServe; returns framed outcomes."""
        path = f"/predictions/{quote(name, safe='')}/{quote(version, safe='')}"
        headers = {
            "content-type": FRAMES_CONTENT_TYPE,
            "accept": OUTCOMES_CONTENT_TYPE,
            "content-length": str(sum(len(chunk) for chunk in chunks)),
            **self._tokens.header("inference"),
        }
        with self._map_errors("TorchServe"):
            async with asyncio.timeout(self._timeout_s):
                # A request and a response that held their bodies would keep them until the next garbage collection.
                async with self._inference.stream(
                    "POST", path, headers=headers, content=_each(chunks)
                ) as reply:
                    body = b"".join([piece async for piece in reply.aiter_raw()])
        if reply.status_code != 200:
            raise _batch_error(reply.status_code, body)
        if reply.headers.get("content-type") != OUTCOMES_CONTENT_TYPE:
            raise BackendBroken(
                f"model {name} {version} was not packed by mmdet3d-serve: it answers with Content-Type "
                f"{reply.headers.get('content-type')!r}; make its archive with `mmdet3d-serve archive`"
            )
        return body

    async def _wait_until_noticed(self, name: str, version: str, pid: int) -> None:
        """Wait until TorchServe has noticed that a worker died.

        Before that it still passes batches to the dead worker, and the failure would count as a second death.
        """
        for _ in range(_MAX_POLLS):
            try:
                workers = await self._management.workers(name, version, _STATE_TIMEOUT_S)
            except DeadlineExceeded:  # predictions do not depend on the management port
                return
            if not any(worker.ready and worker.pid == pid for worker in workers):
                return
            await asyncio.sleep(_POLL_S)
        logger.warning("worker %d of %s %s closed a connection but is still alive", pid, name, version)

    @contextmanager
    def _map_errors(self, what: str) -> Iterator[None]:
        """Map exceptions of httpx and the worker sockets to errors of `serve.errors`."""
        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as error:
            raise NotReady(f"cannot connect to {what}; retry later") from error
        except (TimeoutError, httpx.TimeoutException) as error:
            raise DeadlineExceeded(f"{what} did not answer within {self._timeout_s:g} s") from error
        except (WorkerLost, httpx.TransportError) as error:
            # Lost before the answer was complete: the process died, and may be back at once.
            pid = error.pid if isinstance(error, WorkerLost) else None
            raise _WorkerDied(f"lost the connection to {what}: {error}", pid) from error

    # States

    async def models(self) -> list[ModelState]:
        """List all versions of all registered models.

        Raises:
            NotReady: TorchServe is not reachable.
            DeadlineExceeded: no answer within the timeout.
            BackendBroken: the answer has an unknown format.
        """
        found = await self._management.states(_STATE_TIMEOUT_S)
        self._states = {(state.name, state.version): state for state in found}
        if self._sockets is not None:
            self._sockets.retain({pid for state in found for pid in state.pids})
        return found

    async def describe(self, name: str, version: str) -> dict[str, Any]:
        """Ask a worker for the description of its archive; waits for a free worker.

        Raises:
            BackendBroken: the model was not packed by this project.
            NotReady: TorchServe is not reachable, or the worker that was asked died.
            DeadlineExceeded: no answer within the timeout.
        """
        document = await self._management.description(name, version, _DESCRIBE_TIMEOUT_S)
        if not isinstance(document, dict) or "modality" not in document:
            raise BackendBroken(
                f"model {name} {version} was not packed by mmdet3d-serve: it has no description; make its archive with "
                "`mmdet3d-serve archive`"
            )
        return document


class _WorkerDied(NotReady):
    """The worker died with the batch; another one may take it. `pid` is set if TorchServe may not have noticed yet."""

    def __init__(self, message: str, pid: int | None = None) -> None:
        super().__init__(message)
        self.pid = pid


class _WorkerKilled(OutOfMemory):
    """The worker was killed from outside (exit code 137, TorchServe 0.12 answers 507), most often for its memory."""


def _batch_error(status: int, body: bytes) -> ServeError:
    """Error of a batch that TorchServe answered with a status other than 200."""
    if names_dead_worker(body):
        if status == 500:
            return _WorkerDied("a worker died with the batch")
        if status == 507:
            return _WorkerKilled(
                "a worker was killed with this frame, most often for lack of memory; send a smaller frame"
            )
    return error_from_reply(status, body)


def _frame_error(status: int, body: Bytes) -> ServeError:
    """Error of one frame, as its worker answered it."""
    try:
        return error_from_response(status, json.loads(bytes(body)))
    except Exception as error:
        return BackendBroken(f"a worker answered {status} and no JSON: {type(error).__name__}")


async def _each(chunks: Sequence[Bytes]) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk  # type: ignore[misc]

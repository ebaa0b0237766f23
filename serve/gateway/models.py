"""Model registry: all served model versions with their workers, descriptions and batchers.

Nothing is polled. A request, or a health check, that finds the registry older than a second triggers a refresh, so
that an idle gateway does nothing, and a model that was registered, scaled or removed is noticed with the next request.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from serve.errors import BackendBroken, ModelNotFound, NotReady, ServeError
from serve.gateway.backend import Answer, ModelState, TorchServeBackend
from serve.gateway.batcher import Batcher, BatchReport, BatchResult
from serve.gateway.options import GatewayOptions
from serve.gateway.statistics import ModelStatistics
from serve.protocol.batching import BatchRule
from serve.protocol.worker import EncodedFrame

__all__ = ["FrameObserver", "Health", "ModelRegistry", "ModelVersion"]

MAX_AGE_S = 1.0  # maximum age before a refresh
MIN_RETRY_S = 0.2  # minimum delay after a failed refresh

# Called with the version that answered a frame, the frame, and its outcome.
FrameObserver = Callable[["ModelVersion", EncodedFrame, BatchResult[Answer] | ServeError], None]

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class ModelVersion:
    """One version of a model.

    Attributes:
        state: its state in TorchServe.
        spec: description of the archive; None until a worker has answered with it.
        rejected: the reason if the gateway does not serve it, else None.
        described_by: process ids of the workers when `spec` was read.
        batcher: its queue; created from `spec`, which determines the cost of a batch.
        statistics: of its batches.
        observers: called with every frame that has its outcome (`serve.gateway.dispatch`); those of the registry.
    """

    state: ModelState
    spec: Mapping[str, Any] | None = None
    rejected: str | None = None
    described_by: frozenset[int] = frozenset()
    batcher: Batcher[EncodedFrame, Answer] | None = field(default=None, repr=False)
    statistics: ModelStatistics = field(default_factory=ModelStatistics, repr=False)
    observers: Sequence[FrameObserver] = field(default=(), repr=False)

    @property
    def status(self) -> Literal["ready", "loading", "refused"]:
        """Status as one word, as ``GET /models`` shows it."""
        if self.rejected is not None:
            return "refused"
        return "ready" if self.state.ready and self.batcher is not None else "loading"


@dataclass(frozen=True)
class Health:
    """Readiness of the gateway, and the reasons against it."""

    ready: bool
    reasons: tuple[str, ...] = ()


class ModelRegistry:
    """All served model versions; belongs to one event loop."""

    def __init__(self, backend: TorchServeBackend, options: GatewayOptions) -> None:
        """Start empty; the first `refresh` or `find` reads the models."""
        self._backend = backend
        self._options = options
        # Called with the model's name and the report of every batch.
        self.on_batch: Callable[[str, BatchReport], None] = lambda model, report: None
        # Called with each refresh, before the models are read.
        self.on_refresh: Callable[[], Awaitable[None]] | None = None
        # Called with the names and versions that are registered, after they were read.
        self.on_versions: Callable[[Collection[tuple[str, str]]], None] = lambda versions: None
        # Called with every frame of any model that has its outcome. On the event loop, after the answer of a request
        # of one frame was written: an observer must return at once, and keep no view (`serve.gateway.frame_copies`).
        self.frame_observers: list[FrameObserver] = []
        self._models: dict[tuple[str, str], ModelVersion] = {}
        self._names = 0
        self._refreshed_at = float("-inf")
        self._error: ServeError | None = NotReady("the gateway has not reached TorchServe yet; retry later")
        self._refreshing: asyncio.Task[None] | None = None
        self._describing: dict[tuple[str, str], asyncio.Task[None]] = {}

    def all(self) -> Sequence[ModelVersion]:
        """Return all versions of all models, sorted by name and version."""
        return [self._models[key] for key in sorted(self._models)]

    def versions(self, name: str) -> Sequence[ModelVersion]:
        """Return all versions of one model.

        Raises:
            ModelNotFound: no model has that name.
        """
        found = [model for model in self.all() if model.state.name == name]
        if not found:
            raise self._not_found(name)
        return found

    def is_registered(self, name: str) -> bool:
        """Return whether a model of that name is registered."""
        return any(key[0] == name for key in self._models)

    def get(self, name: str, version: str) -> ModelVersion | None:
        """Return a registered version, in whatever state it is."""
        return self._models.get((name, version))

    def count(self) -> int:
        """Return the number of registered models, whatever their versions."""
        return self._names

    async def find(self, name: str, version: str | None) -> ModelVersion:
        """Return the version that serves a request, ready to take frames.

        Args:
            name: name of the model.
            version: its version; None selects the default version.

        Raises:
            ModelNotFound: no model has that name and version.
            NotReady: TorchServe is not reachable or hangs, or the model is loading or rejected.
        """
        found = self._find(name, version)
        if found is None or found.status != "ready":
            await self.refresh(MIN_RETRY_S)
            if self._error is not None:
                raise type(self._error)(str(self._error))
            found = self._find(name, version)
        elif self._hangs(found):
            if self._age_s() > MIN_RETRY_S:
                self._start_refresh()  # in the background: it may take until its timeout
            raise NotReady(
                f"TorchServe hangs: neither the management port nor a batch of {name} gets an answer; retry later"
            )
        elif self._age_s() > MAX_AGE_S:
            self._start_refresh()  # in the background; this request uses the present state
        if found is None:
            raise self._not_found(name, version)
        if found.spec is None and (
            describing := self._describing.get((found.state.name, found.state.version))
        ):
            await asyncio.wait([describing])
        if found.rejected is not None:
            raise NotReady(f"model {name!r} was rejected: {found.rejected}")
        if found.batcher is None:
            raise NotReady(f"model {name!r} is still loading; retry later")
        return found

    def find_ready(self, name: str, version: str | None) -> ModelVersion | None:
        """Return a version that can take frames now, None if it cannot; waits for nothing, and refreshes as `find`."""
        if self._age_s() > MAX_AGE_S:
            self._start_refresh()
        found = self._find(name, version)
        return found if found is not None and found.status == "ready" and not self._hangs(found) else None

    async def refresh(self, older_than_s: float = MAX_AGE_S) -> None:
        """Refresh if the registry is older than `older_than_s`, and wait; concurrent callers share one refresh."""
        if self._age_s() > older_than_s:
            await asyncio.wait([self._start_refresh()])

    async def health(self) -> Health:
        """Check readiness: TorchServe answers, the required models are ready, no batch is stuck."""
        await self.refresh(MIN_RETRY_S)
        if self._error is not None:
            return Health(False, (str(self._error),))
        ready = {model.state.name for model in self._models.values() if model.status == "ready"}
        reasons = [f"model {name} is not ready" for name in self._options.require_models if name not in ready]
        if not ready:
            reasons.append("no model is ready" if self._models else "no model is registered")
        for model in self._models.values():
            stuck_s = model.batcher.stalled_s() if model.batcher is not None else 0.0
            if stuck_s > self._options.stall_timeout_s:
                reasons.append(f"a batch of {model.state.name} has been running for {stuck_s:.0f} s")
        return Health(not reasons, tuple(reasons))

    async def close(self) -> None:
        """Cancel background refreshes."""
        tasks = [task for task in (self._refreshing, *self._describing.values()) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _observe_batch(self, model: ModelVersion, report: BatchReport) -> None:
        if report.failed:
            self._refreshed_at = float("-inf")  # the next request refreshes
        if report.background:  # no request waited for it
            return
        model.statistics.observe(report)
        self.on_batch(model.state.name, report)

    def _not_found(self, name: str, version: str | None = None) -> ModelNotFound:
        known = sorted({key[0] for key in self._models})
        if version is not None and name in known:
            known = sorted(key[1] for key in self._models if key[0] == name)
        suffix = "" if version is None else f" version {version!r}"
        return ModelNotFound(f"model {name!r}{suffix} not found; available: {', '.join(known) or 'none'}")

    def _find(self, name: str, version: str | None) -> ModelVersion | None:
        if version is not None:
            return self._models.get((name, version))
        return next((m for m in self._models.values() if m.state.name == name and m.state.default), None)

    def _hangs(self, model: ModelVersion) -> bool:
        """Return whether TorchServe neither answers nor finishes a batch; a frame would wait for its deadline."""
        return self._error is not None and model.batcher is not None and model.batcher.stalled_s() > MAX_AGE_S

    def _age_s(self) -> float:
        return asyncio.get_running_loop().time() - self._refreshed_at

    def _start_refresh(self) -> asyncio.Task[None]:
        if self._refreshing is None or self._refreshing.done():
            self._refreshing = asyncio.create_task(self._refresh())
        return self._refreshing

    async def _refresh(self) -> None:
        if self.on_refresh is not None:
            await self.on_refresh()
        try:
            states = await self._backend.models()
        except ServeError as error:
            if self._error is None:
                logger.warning("cannot reach TorchServe: %s", error)
            self._error = error if isinstance(error, NotReady) else NotReady(str(error))
        except Exception:
            logger.exception("cannot read TorchServe's list of models")
            self._error = NotReady("cannot read TorchServe's list of models; see the gateway's log")
        else:
            if self._error is not None:
                logger.info("TorchServe is reachable")
            self._error = None
            self._update(states)
        self._refreshed_at = asyncio.get_running_loop().time()

    def _update(self, states: Sequence[ModelState]) -> None:
        now = {(state.name, state.version): state for state in states}
        self._names = len({state.name for state in states})
        for key in self._models.keys() - now.keys():
            logger.info("model %s %s was removed", *key)
            del self._models[key]
        for key, state in now.items():
            model = self._models.setdefault(key, ModelVersion(state, observers=self.frame_observers))
            model.state = state
            if model.batcher is not None:
                # Without a ready worker one is being restarted; TorchServe holds one batch for it.
                model.batcher.set_slots(max(1, state.ready))
            if state.ready and _is_stale(model) and key not in self._describing:
                task = asyncio.create_task(self._describe(model))
                self._describing[key] = task
                task.add_done_callback(lambda done, key=key: self._describing.pop(key, None))  # type: ignore[misc]
        self.on_versions(now.keys())

    async def _describe(self, model: ModelVersion) -> None:
        """Read the description of a new model, or of one with new workers, whose archive may have changed."""
        state = model.state
        try:
            spec = await self._backend.describe(state.name, state.version)
        except BackendBroken as error:
            logger.warning("rejected model %s %s: %s", state.name, state.version, error)
            model.rejected, model.described_by = str(error), frozenset(state.pids)
            return
        except ServeError as error:
            logger.warning("cannot read the description of model %s %s: %s", state.name, state.version, error)
            return
        if model.spec is None or _identity(spec) != _identity(model.spec):
            model.spec, model.batcher = spec, self._create_batcher(model, spec)
            logger.info("model %s %s is ready: %s", state.name, state.version, spec["modality"])
        model.rejected, model.described_by = None, frozenset(state.pids)

    def _create_batcher(self, model: ModelVersion, spec: Mapping[str, Any]) -> Batcher[EncodedFrame, Answer]:
        options, state = self._options, model.state
        rule = BatchRule.of(
            spec,
            frames=options.batch_frames,
            points=options.batch_points,
            pixels=options.batch_pixels,
            nbytes=options.batch_bytes,
        )
        return Batcher(
            partial(self._backend.run, state.name, state.version),
            rule.limits,
            batch_cost=rule.batch_cost,
            slots=max(1, state.ready),
            prefetch=options.prefetch_batches,
            lead_time_s=options.lead_time_s,
            observe=partial(self._observe_batch, model),
        )


def _is_stale(model: ModelVersion) -> bool:
    """Return whether a description must be read anew: every worker is new, or one that may answer better."""
    pids = frozenset(model.state.pids)
    return pids != model.described_by if model.rejected is not None else model.described_by.isdisjoint(pids)


def _identity(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a description that identifies the model: all but the worker's own timing."""
    return {name: value for name, value in spec.items() if name != "self_test"}

"""What is served now: every version of every model with its workers, its description and its batcher.

The one owner of that state. Nothing is polled: the table is renewed when a request or a question of health
finds it older than a second, so an idle gateway does nothing, and a model that is registered, scaled or
removed is seen by the next request. Knows nothing about HTTP requests or what frames hold.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from serve.errors import BackendBroken, ModelNotFound, NotReady, ServeError
from serve.gateway.backend import Answer, Frame, ModelState, TorchServeBackend
from serve.gateway.batcher import Batcher, BatchLimits, BatchReport, Settled, padded, ragged
from serve.gateway.cost import Measure
from serve.gateway.options import GatewayOptions

__all__ = ["Health", "ModelTable", "ServedModel"]

FRESH_S = 1.0  # a table this young is believed
RETRY_S = 0.2  # after a failed look, the next one comes no sooner

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class ServedModel:
    """One version of a model.

    Attributes:
        state: as TorchServe has it.
        spec: what the model says of itself; None until a worker of it could be asked.
        refused: why it is not served, where it is not.
        described_by: the workers that were there when `spec` was asked.
        batcher: its queue; made with `spec`, which says what a batch costs.
    """

    state: ModelState
    spec: Mapping[str, Any] | None = None
    refused: str | None = None
    described_by: frozenset[int] = frozenset()
    batcher: Batcher[Frame, Answer] | None = field(default=None, repr=False)

    @property
    def status(self) -> Literal["ready", "loading", "refused"]:
        """In a word."""
        if self.refused is not None:
            return "refused"
        return "ready" if self.state.ready and self.batcher is not None else "loading"

    async def submit(self, frame: Frame, size: Measure) -> Settled[Answer]:
        """The outcome of one frame.

        Raises:
            ServeError: the frame's own outcome, or its batch's.
        """
        assert self.batcher is not None
        try:
            return await self.batcher.submit(frame, cost=size.cost, nbytes=size.nbytes, key=size.key)
        finally:
            frame.wanted = False


@dataclass(frozen=True)
class Health:
    """Whether frames would be answered, and why not."""

    ready: bool
    reasons: tuple[str, ...] = ()


class ModelTable:
    """All that is served; belongs to one event loop."""

    def __init__(
        self,
        backend: TorchServeBackend,
        options: GatewayOptions,
        observe: Callable[[str, BatchReport], None] = lambda model, report: None,
    ) -> None:
        """`observe` is told of every batch, with the model's name."""
        self._backend = backend
        self._options = options
        self._observe = observe
        self._models: dict[tuple[str, str], ServedModel] = {}
        self._looked_at = float("-inf")
        self._trouble: ServeError | None = NotReady("TorchServe has not been asked yet")
        self._looking: asyncio.Task[None] | None = None
        self._describing: dict[tuple[str, str], asyncio.Task[None]] = {}

    def all(self) -> Sequence[ServedModel]:
        """Every version, by name and version."""
        return [self._models[key] for key in sorted(self._models)]

    def versions(self, name: str) -> Sequence[ServedModel]:
        """All versions of one model.

        Raises:
            ModelNotFound: there is none.
        """
        found = [model for model in self.all() if model.state.name == name]
        if not found:
            raise self._not_found(name)
        return found

    def knows(self, name: str) -> bool:
        """Whether a model of that name is registered."""
        return any(key[0] == name for key in self._models)

    async def find(self, name: str, version: str | None) -> ServedModel:
        """The model a request means, ready to take frames.

        Raises:
            ModelNotFound: there is none of that name and version.
            NotReady: TorchServe does not answer, or the model is still loading.
        """
        found = self._find(name, version)
        if found is None or found.status != "ready":
            await self.renew(RETRY_S)
            if self._trouble is not None:
                raise type(self._trouble)(str(self._trouble))
            found = self._find(name, version)
        elif self._hangs(found):
            if self._age_s() > RETRY_S:
                self._look()  # not waited for: it takes as long as questions may take
            raise NotReady(
                f"TorchServe hangs: it answers no question, and no batch of {name} ends; retry later"
            )
        elif self._age_s() > FRESH_S:
            self._look()  # in the background; this request goes on with what is known
        if found is None:
            raise self._not_found(name if version is None else f"{name} {version}")
        if found.spec is None and (
            describing := self._describing.get((found.state.name, found.state.version))
        ):
            await asyncio.wait([describing])
        if found.refused is not None:
            raise NotReady(f"model {name} is refused: {found.refused}")
        if found.batcher is None:
            raise NotReady(f"model {name} is still loading; retry later")
        return found

    async def renew(self, older_than_s: float = FRESH_S) -> None:
        """Look again, unless the table is younger than that; one look at a time, shared by all who wait."""
        if self._age_s() > older_than_s:
            await asyncio.wait([self._look()])

    def stale(self) -> None:
        """Something went wrong with the backend: the next request looks again."""
        self._looked_at = float("-inf")

    async def health(self) -> Health:
        """Whether frames would be answered: TorchServe answers, models are ready, no batch is stuck."""
        await self.renew(RETRY_S)
        if self._trouble is not None:
            return Health(False, (str(self._trouble),))
        ready = {model.state.name for model in self._models.values() if model.status == "ready"}
        reasons = [f"model {name} is not ready" for name in self._options.require_models if name not in ready]
        if not ready:
            reasons.append("no model is ready" if self._models else "no model is registered")
        for model in self._models.values():
            stuck_s = model.batcher.stalled_s() if model.batcher is not None else 0.0
            if stuck_s > self._options.stall_s:
                reasons.append(f"a batch of {model.state.name} has been running for {stuck_s:.0f} s")
        return Health(not reasons, tuple(reasons))

    async def close(self) -> None:
        """End what looks in the background."""
        tasks = [task for task in (self._looking, *self._describing.values()) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # Inside

    def _not_found(self, said: str) -> ModelNotFound:
        known = ", ".join(sorted({key[0] for key in self._models})) or "none"
        return ModelNotFound(f"no model {said} is served; served are: {known}")

    def _find(self, name: str, version: str | None) -> ServedModel | None:
        if version is not None:
            return self._models.get((name, version))
        return next((m for m in self._models.values() if m.state.name == name and m.state.default), None)

    def _hangs(self, model: ServedModel) -> bool:
        """Whether TorchServe neither answers nor finishes what it has: another frame would wait for its deadline."""
        return self._trouble is not None and model.batcher is not None and model.batcher.stalled_s() > FRESH_S

    def _age_s(self) -> float:
        return asyncio.get_running_loop().time() - self._looked_at

    def _look(self) -> asyncio.Task[None]:
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._renew())
        return self._looking

    async def _renew(self) -> None:
        try:
            states = await self._backend.models()
        except ServeError as error:
            if self._trouble is None:
                logger.warning("TorchServe is not to be reached: %s", error)
            self._trouble = error if isinstance(error, NotReady) else NotReady(str(error))
        except Exception:
            logger.exception("the answer about models could not be read")
            self._trouble = NotReady("TorchServe answers in a way the gateway cannot read; see its log")
        else:
            if self._trouble is not None:
                logger.info("TorchServe answers")
            self._trouble = None
            self._take(states)
        self._looked_at = asyncio.get_running_loop().time()

    def _take(self, states: Sequence[ModelState]) -> None:
        now = {(state.name, state.version): state for state in states}
        for key in self._models.keys() - now.keys():
            logger.info("model %s %s is gone", *key)
            del self._models[key]
        for key, state in now.items():
            model = self._models.setdefault(key, ServedModel(state))
            model.state = state
            if model.batcher is not None:
                # With none ready a worker is being restarted; TorchServe keeps one batch for it.
                model.batcher.set_slots(max(1, state.ready))
            if state.ready and model.described_by.isdisjoint(state.workers) and key not in self._describing:
                task = asyncio.create_task(self._describe(model))
                self._describing[key] = task
                task.add_done_callback(lambda done, key=key: self._describing.pop(key, None))  # type: ignore[misc]

    async def _describe(self, model: ServedModel) -> None:
        """Ask a model what it is: at first sight, and when all its workers are new, for it may be another one."""
        state = model.state
        try:
            spec = await self._backend.describe(state.name, state.version)
        except BackendBroken as error:
            logger.warning("model %s %s is refused: %s", state.name, state.version, error)
            model.refused, model.described_by = str(error), frozenset(state.workers)
            return
        except ServeError as error:
            logger.warning("model %s %s could not be asked what it is: %s", state.name, state.version, error)
            return
        if model.spec is None or _identity(spec) != _identity(model.spec):
            model.spec, model.batcher = spec, self._batcher(model, spec)
            logger.info("model %s %s is ready: %s", state.name, state.version, spec["modality"])
        model.refused, model.described_by = None, frozenset(state.workers)

    def _batcher(self, model: ServedModel, spec: Mapping[str, Any]) -> Batcher[Frame, Answer]:
        options, state = self._options, model.state
        clouds = "points" in spec["parts"] if spec.get("parts") else spec["modality"] == "lidar"

        async def run(frames: Sequence[Frame]) -> Sequence[Answer | Exception]:
            try:
                return await self._backend.run(state.name, state.version, frames)
            except ServeError:
                self.stale()
                raise

        return Batcher(
            run,
            BatchLimits(
                items=options.batch_frames,
                cost=options.batch_points if clouds else options.batch_pixels,
                nbytes=options.batch_bytes,
            ),
            batch_cost=ragged if clouds else padded,
            slots=max(1, state.ready),
            ahead=options.batches_ahead,
            early_s=options.early_s,
            observe=lambda report: self._observe(state.name, report),
        )


def _identity(spec: Mapping[str, Any]) -> dict[str, Any]:
    """What makes it the same model; a worker's own timing does not."""
    return {name: value for name, value in spec.items() if name != "self_test"}

"""Canaries: versions of a model that answer a share of the requests that name no version.

The share of a canary is the most that it gets. A canary that cannot take frames is passed over, and a frame that it
fails on, or does not answer in half of the time, is sent to the default version, so that a new version costs no
request. What the default version fails on is
not sent to a canary.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass

from serve.errors import ServeError
from serve.gateway.dispatch import Fallback
from serve.gateway.metrics import FAILURE_CODES, Metrics
from serve.gateway.models import ModelRegistry, ModelVersion
from serve.gateway.rollout import EvenChoice, Rollout
from serve.gateway.tracks import TrackRequest, TrackSessions

__all__ = ["Canaries", "Chosen", "takes_same_frames"]

# Properties of a model that decide how its frames are read.
_INPUTS = ("modality", "parts", "load_dim", "columns", "sweeps")
# Why a canary does not answer, as labels of a metric.
_REASONS = ("stalled", "other_inputs", *FAILURE_CODES)

logger = logging.getLogger(__name__)


@dataclass
class Chosen:
    """Version that answers a request.

    Attributes:
        model: the version.
        fallback: answers the frames on which it fails; None if it is the default version, or was named.
    """

    model: ModelVersion
    fallback: Fallback | None = None

    def versions(self, frames: int) -> str:
        """Name the version that answered `frames` frames, or both if some of them were sent to the default one."""
        version = self.model.state.version
        if self.fallback is None or not self.fallback.frames:
            return version
        default = self.fallback.model.state.version
        return default if self.fallback.frames >= frames else f"{version}, {default}"


class Canaries:
    """Chooses the version for each request."""

    def __init__(
        self,
        registry: ModelRegistry,
        rollout: Rollout,
        sessions: TrackSessions,
        metrics: Metrics,
        stall_s: float,
    ) -> None:
        """Choose by the shares of `rollout`.

        Args:
            registry: the served models.
            rollout: the shares.
            sessions: the open sequences, each of which stays with its version.
            metrics: count what a canary did not answer.
            stall_s: a canary whose batch has been running for longer is passed over.
        """
        self._registry, self._rollout, self._sessions, self._metrics = registry, rollout, sessions, metrics
        self._stall_s = stall_s
        self._choices: dict[str, EvenChoice] = {}
        self._reported: set[tuple[str, str]] = set()

    async def choose(
        self, name: str, version: str | None, client: str = "", track: TrackRequest | None = None
    ) -> Chosen:
        """Choose the version that answers a request, ready to take frames.

        Args:
            name: name of the model.
            version: the version that the request names; None lets the shares decide.
            client: who sent it, as `SessionKey` has it.
            track: the sequence that it belongs to.

        Raises:
            ModelNotFound: no model has that name and version.
            NotReady: the version cannot take frames.
        """
        if version is None and track is not None and not track.start:
            version = self._sessions.find_version(client, name, track.session)
        shares = self._rollout.canary_of(name) if version is None else {}
        if not shares:
            return Chosen(await self._registry.find(name, version))
        point = self._next_point(name) if track is None else _point_of(client, name, track.session)
        for canary, share in shares.items():
            point -= share
            if point < 0:
                return await self._try(name, canary, is_sequence=track is not None)
        return Chosen(await self._registry.find(name, None))

    def show_metrics(self) -> None:
        """Show what canaries did not answer, for each version with a share, also while that is nothing."""
        for name, shares in self._rollout.canary.items():
            for version, share in shares.items():
                if share:
                    self._metrics.show_fallbacks(name, version, _REASONS)

    def _next_point(self, model: str) -> float:
        if model not in self._choices:  # one that has shares: bounded
            self._choices[model] = EvenChoice(model)
        return self._choices[model]()

    async def _try(self, name: str, version: str, *, is_sequence: bool) -> Chosen:
        """Take a canary if it can take frames, else the default version."""
        found = self._registry.find_ready(name, version)
        default = self._registry.find_ready(name, None)
        reason = ""
        if found is None:
            reason = "not_ready"
        elif found.batcher is not None and found.batcher.stalled_s() > self._stall_s:
            reason = "stalled"
        elif default is not None and not takes_same_frames(found, default):
            reason = "other_inputs"
            if (name, version) not in self._reported:
                self._reported.add((name, version))
                logger.error(
                    "version %s of %s gets no share: it takes other frames than version %s (%s)",
                    version,
                    name,
                    default.state.version,
                    ", ".join(_INPUTS),
                )
        if found is None or reason:
            self._metrics.observe_fallback(name, version, reason)
            return Chosen(await self._registry.find(name, None))
        if default is None or default is found or is_sequence:
            return Chosen(found)

        def observe(error: ServeError) -> None:
            self._metrics.observe_fallback(name, version, error.code)

        return Chosen(found, Fallback(default, observe))


def takes_same_frames(one: ModelVersion, other: ModelVersion) -> bool:
    """Return whether two versions read the same bytes as the same frame."""
    specs = one.spec or {}, other.spec or {}
    return all(specs[0].get(name) == specs[1].get(name) for name in _INPUTS)


def _point_of(client: str, model: str, session: str) -> float:
    """Return a number from 0 to 1, always the same for a sequence."""
    digest = hashlib.blake2b(f"{client}\n{model}\n{session}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / (1 << 64)

"""Operational routes: liveness, readiness, models and metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from serve import __version__
from serve.gateway.lifecycle import Lifecycle
from serve.gateway.metrics import CONTENT_TYPE, Metrics
from serve.gateway.models import ModelRegistry, ModelVersion
from serve.gateway.openapi import errors
from serve.gateway.rollout import Rollout
from serve.gateway.siblings import OWN, Siblings, merge_metrics
from serve.gateway.tracks import TrackSessions
from serve.watch.reference import Reference

__all__ = ["router"]


def router(
    registry: ModelRegistry,
    metrics: Metrics,
    lifecycle: Lifecycle,
    sessions: TrackSessions,
    rejected: Mapping[str, str],
    rollout: Rollout,
    siblings: Siblings | None = None,
) -> APIRouter:
    """Create the operational routes.

    Args:
        registry: the served models.
        metrics: of this process.
        lifecycle: whether it drains.
        sessions: the sequences whose objects are tracked.
        rejected: archives that were not loaded, and the reasons.
        rollout: the shares of canaries and shadows.
        siblings: the other processes of the port, whose readiness and metrics count too.
    """
    routes = APIRouter(tags=["operation"])

    @routes.get("/health/live", responses=errors(405))
    async def live() -> dict[str, Any]:
        """Return 200 while the process runs."""
        return {"live": True, "version": __version__}

    @routes.get("/health/ready", responses={503: {"description": "Not ready; `reasons` says why"}})
    async def ready(request: Request) -> Response:
        """Return 200 if frames can be answered; a worker is ready only after its golden frame matched."""
        reasons = list(("draining",) if lifecycle.draining else (await registry.health()).reasons)
        metrics.set_ready(not reasons)
        if siblings is not None and request.url.query != OWN:
            # A reason that all of them have is listed once. One that does not answer is being started again.
            for answer in (await siblings.ask("/health/ready")).values():
                reasons += [reason for reason in answer.json()["reasons"] if reason not in reasons]
        body = {"ready": not reasons, "reasons": reasons}
        return JSONResponse(body, 503 if reasons else 200)

    @routes.get("/ping", responses={503: {"description": "Frames cannot be answered"}})
    async def ping() -> Response:
        """Return TorchServe's own answer: 200 with ``Healthy`` if frames can be answered."""
        is_ready = not lifecycle.draining and (await registry.health()).ready
        return JSONResponse({"status": "Healthy" if is_ready else "Unhealthy"}, 200 if is_ready else 503)

    @routes.get("/models")
    async def models() -> list[dict[str, Any]]:
        """List models that are ready, loading or rejected, with the reason for the latter."""
        await registry.refresh()
        unloaded = [{"archive": file, "status": "refused", "reason": why} for file, why in rejected.items()]
        return [*(_describe(model, sessions, rollout) for model in registry.all()), *unloaded]

    @routes.get("/models/{model}", responses=errors(404))
    async def model(model: str) -> list[dict[str, Any]]:
        """List the versions of one model."""
        await registry.refresh()
        return [_describe(each, sessions, rollout) for each in registry.versions(model)]

    @routes.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def prometheus_metrics(request: Request) -> Response:
        """Return the metrics in Prometheus' text format; of several gateway processes, each has a label."""
        text = metrics.exposition()
        if siblings is not None and request.url.query != OWN:
            answers = await siblings.ask("/metrics")
            others = {name: each.content for name, each in answers.items() if each.is_success}
            text = merge_metrics({str(siblings.index): text, **others})
        return Response(text, headers={"content-type": CONTENT_TYPE})

    return routes


def _describe(model: ModelVersion, sessions: TrackSessions, rollout: Rollout) -> dict[str, Any]:
    state = model.state
    canary = rollout.canary_of(state.name).get(state.version)
    shadow = rollout.shadow_of(state.name).get(state.version)
    spec = dict(model.spec or {})
    reference = spec.pop(Reference.KEY, None)
    description = {name: value for name, value in spec.items() if name not in ("name", "version")}
    if isinstance(reference, dict):  # hundreds of numbers, which /metrics compares with
        description[Reference.KEY] = _describe_reference(reference)
    return {
        "name": state.name,
        "version": state.version,
        "default": state.default,
        "status": model.status,
        "workers": {"ready": state.ready, "all": len(state.workers)},
        **({"waiting": model.batcher.waiting, "running": model.batcher.running} if model.batcher else {}),
        **({"track_sessions": open_} if (open_ := sessions.count(state.name, state.version)) else {}),
        **({"canary_share": canary} if canary is not None else {}),
        **({"shadow_share": shadow} if shadow is not None else {}),
        **({"reason": model.rejected} if model.rejected else {}),
        **description,
    }


def _describe_reference(reference: Mapping[str, Any]) -> dict[str, Any]:
    """Describe how a reference was recorded; its source is a path or URI of the operator's, not for clients."""
    recording = reference.get("recording")
    known = recording if isinstance(recording, Mapping) else {}
    return {
        "reference_frames": reference.get("frames"),
        **({"recorded": known["time"]} if "time" in known else {}),
        **({"window_frames": known["window_frames"]} if "window_frames" in known else {}),
    }

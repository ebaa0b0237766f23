"""Operational routes: liveness, readiness, models and metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from serve import __version__
from serve.gateway.lifecycle import Lifecycle
from serve.gateway.metrics import CONTENT_TYPE, Metrics
from serve.gateway.models import ModelRegistry, ModelVersion
from serve.gateway.openapi import errors

__all__ = ["router"]


def router(
    registry: ModelRegistry, metrics: Metrics, lifecycle: Lifecycle, rejected: Mapping[str, str]
) -> APIRouter:
    """Create the operational routes; `rejected` maps archives that were not loaded to the reason."""
    routes = APIRouter(tags=["operation"])

    @routes.get("/health/live", responses=errors(405))
    async def live() -> dict[str, Any]:
        """Return 200 while the process runs."""
        return {"live": True, "version": __version__}

    @routes.get("/health/ready", responses={503: {"description": "Not ready; `reasons` says why"}})
    async def ready() -> Response:
        """Return 200 if frames can be answered; a worker is ready only after its golden frame matched."""
        reasons = ("draining",) if lifecycle.draining else (await registry.health()).reasons
        metrics.set_ready(not reasons)
        body = {"ready": not reasons, "reasons": list(reasons)}
        return JSONResponse(body, 503 if reasons else 200)

    @routes.get("/models")
    async def models() -> list[dict[str, Any]]:
        """List models that are ready, loading or rejected, with the reason for the latter."""
        await registry.refresh()
        unloaded = [{"archive": file, "status": "refused", "reason": why} for file, why in rejected.items()]
        return [*(_describe(model) for model in registry.all()), *unloaded]

    @routes.get("/models/{model}", responses=errors(404))
    async def model(model: str) -> list[dict[str, Any]]:
        """List the versions of one model."""
        await registry.refresh()
        return [_describe(each) for each in registry.versions(model)]

    @routes.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def prometheus_metrics() -> Response:
        """Return the metrics in Prometheus' text format."""
        return Response(metrics.exposition(), headers={"content-type": CONTENT_TYPE})

    return routes


def _describe(model: ModelVersion) -> dict[str, Any]:
    state = model.state
    description = {
        name: value for name, value in (model.spec or {}).items() if name not in ("name", "version")
    }
    return {
        "name": state.name,
        "version": state.version,
        "default": state.default,
        "status": model.status,
        "workers": {"ready": state.ready, "all": len(state.workers)},
        **({"waiting": model.batcher.waiting, "running": model.batcher.running} if model.batcher else {}),
        **({"reason": model.rejected} if model.rejected else {}),
        **description,
    }

"""Routes for those who operate: liveness, readiness, models, metrics.

Liveness asks whether this process turns; readiness whether a frame would be answered. Knows nothing about frames.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from serve import __version__
from serve.gateway.lifecycle import Life
from serve.gateway.metrics import CONTENT_TYPE, Measures
from serve.gateway.models import ModelTable, ServedModel
from serve.gateway.openapi import errors

__all__ = ["router"]


def router(table: ModelTable, measures: Measures, life: Life, refused: Mapping[str, str]) -> APIRouter:
    """The routes of operation; `refused` are archives that were not loaded, with the reason of each."""
    routes = APIRouter(tags=["operation"])

    @routes.get("/health/live", responses=errors(405))
    async def live() -> dict[str, Any]:
        """Whether the process turns."""
        return {"live": True, "version": __version__}

    @routes.get("/health/ready", responses={503: {"description": "Not ready; `reasons` says why"}})
    async def ready() -> Response:
        """Whether a frame would be answered now; every model's golden frame ran before its worker was ready."""
        reasons = ("draining",) if life.draining else (await table.health()).reasons
        measures.ready(not reasons)
        body = {"ready": not reasons, "reasons": list(reasons)}
        return JSONResponse(body, 503 if reasons else 200)

    @routes.get("/models")
    async def models() -> list[dict[str, Any]]:
        """What is served, what is loading, and what is refused and why."""
        await table.renew()
        left_out = [{"archive": file, "status": "refused", "reason": why} for file, why in refused.items()]
        return [*(_described(model) for model in table.all()), *left_out]

    @routes.get("/models/{model}", responses=errors(404))
    async def model(model: str) -> list[dict[str, Any]]:
        """All versions of one model."""
        await table.renew()
        return [_described(each) for each in table.versions(model)]

    @routes.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Prometheus metrics."""
        return Response(measures.exposition(), headers={"content-type": CONTENT_TYPE})

    return routes


def _described(model: ServedModel) -> dict[str, Any]:
    state = model.state
    said = {name: value for name, value in (model.spec or {}).items() if name not in ("name", "version")}
    return {
        "name": state.name,
        "version": state.version,
        "default": state.default,
        "status": model.status,
        "workers": {"ready": state.ready, "all": len(state.workers)},
        **({"waiting": model.batcher.waiting, "running": model.batcher.running} if model.batcher else {}),
        **({"reason": model.refused} if model.refused else {}),
        **said,
    }

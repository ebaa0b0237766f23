"""Routes of Triton's extensions about models: configuration, statistics and the repository's index.

Sources: triton-inference-server/server, ``docs/protocol/extension_model_configuration.md``, ``…_statistics.md`` and
``…_model_repository.md``; ``model_config.proto`` of triton-inference-server/common. Models are loaded and unloaded
through TorchServe's management port only, which only its own machine can reach: requests for it are refused here.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from fastapi import APIRouter, Request

from serve.errors import BadRequest
from serve.gateway.admission import Permit
from serve.gateway.middleware import permit_of
from serve.gateway.models import ModelRegistry, ModelVersion
from serve.gateway.openapi import errors
from serve.gateway.options import GatewayOptions
from serve.gateway.request import read_body
from serve.gateway.routes.kserve_codec import model_metadata
from serve.protocol.json_reader import read_json

__all__ = ["router"]

_STATES = {"ready": "READY", "loading": "LOADING", "refused": "UNAVAILABLE"}


def router(options: GatewayOptions, registry: ModelRegistry, rejected: Mapping[str, str]) -> APIRouter:
    """Create the routes.

    Args:
        options: options of the gateway.
        registry: the served models.
        rejected: archives that were not loaded, and the reasons.
    """
    routes = APIRouter(prefix="/v2", tags=["open inference protocol"])
    error_responses = partial(errors, protocol=True)

    async def config(model: str, version: str | None) -> dict[str, Any]:
        return _config(await registry.find(model, version))

    @routes.get("/models/{model}/config", responses=error_responses(404, 503))
    async def default_config(model: str) -> dict[str, Any]:
        """Return the configuration of the model, as Triton's clients read it."""
        return await config(model, None)

    @routes.get("/models/{model}/versions/{version}/config", responses=error_responses(404, 503))
    async def version_config(model: str, version: str) -> dict[str, Any]:
        """Return the configuration of this version."""
        return await config(model, version)

    @routes.get("/models/stats")
    async def all_statistics() -> dict[str, Any]:
        """Return counts and durations of all models, of this process since its start."""
        await registry.refresh()
        return {"model_stats": [_statistics(each) for each in registry.all()]}

    @routes.get("/models/{model}/stats", responses=error_responses(404))
    async def model_statistics(model: str) -> dict[str, Any]:
        """Return counts and durations of all versions of the model."""
        await registry.refresh()
        return {"model_stats": [_statistics(each) for each in registry.versions(model)]}

    @routes.get("/models/{model}/versions/{version}/stats", responses=error_responses(404, 503))
    async def version_statistics(model: str, version: str) -> dict[str, Any]:
        """Return counts and durations of this version."""
        return {"model_stats": [_statistics(await registry.find(model, version))]}

    @routes.post("/repository/index", responses=error_responses(400, 408, 413))
    async def index(request: Request) -> list[dict[str, Any]]:
        """List all models with their state; of the body only ``ready`` counts, which leaves out the others."""
        only_ready = await _wants_ready(request, permit_of(request.scope), options)
        await registry.refresh()
        entries = [_entry(model) for model in registry.all()]
        entries += [
            {"name": archive, "version": "", "state": "UNAVAILABLE", "reason": why}
            for archive, why in rejected.items()
        ]
        return [each for each in entries if each["state"] == "READY" or not only_ready]

    @routes.post("/repository/models/{model}/load", status_code=400, responses=error_responses(400))
    async def load(model: str) -> None:
        """Refuse: models are loaded through TorchServe's management port."""
        raise _refusal("load")

    @routes.post("/repository/models/{model}/unload", status_code=400, responses=error_responses(400))
    async def unload(model: str) -> None:
        """Refuse: models are unloaded through TorchServe's management port."""
        raise _refusal("unload")

    return routes


def _config(model: ModelVersion) -> dict[str, Any]:
    """Return a ``ModelConfig``; no dimension is one of a batch, because the gateway batches requests itself."""
    spec = model.spec or {}
    described = model_metadata(model.state.name, [model.state.version], spec)
    is_gpu = str(spec.get("device", "cpu")).startswith("cuda")
    return {
        "name": model.state.name,
        "platform": described["platform"],
        "backend": described["platform"],
        "version_policy": {"all": {}},
        "max_batch_size": 0,
        "input": [_tensor(each) for each in described["inputs"]],
        "output": [_tensor(each) for each in described["outputs"]],
        "instance_group": [
            {
                "name": "workers",
                "kind": "KIND_GPU" if is_gpu else "KIND_CPU",
                "count": len(model.state.workers),
            }
        ],
        "model_transaction_policy": {"decoupled": False},
        "parameters": {"version": {"string_value": model.state.version}},
    }


def _tensor(described: Mapping[str, Any]) -> dict[str, Any]:
    datatype = described["datatype"]
    found = {
        "name": described["name"],
        "data_type": "TYPE_STRING" if datatype == "BYTES" else f"TYPE_{datatype}",
        "dims": described["shape"],
    }
    return {**found, "optional": True} if described.get("optional") else found


def _statistics(model: ModelVersion) -> dict[str, Any]:
    return model.statistics.document(model.state.name, model.state.version)


def _entry(model: ModelVersion) -> dict[str, Any]:
    state = _STATES[model.status]
    return {
        "name": model.state.name,
        "version": model.state.version,
        "state": state,
        "reason": model.rejected or "",
    }


async def _wants_ready(request: Request, permit: Permit, options: GatewayOptions) -> bool:
    body = await read_body(request, permit, options)
    document = read_json(body, options.json_bounds) if body else {}
    ready = document.get("ready", False) if isinstance(document, dict) else None
    if not isinstance(ready, bool):
        raise BadRequest('the body of an index must be empty, or an object such as {"ready": true}')
    return ready


def _refusal(what: str) -> BadRequest:
    return BadRequest(
        f"this port does not {what} models; use TorchServe's management port (8081) on the server's own machine"
    )

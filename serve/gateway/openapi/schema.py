"""Parts that schemas of the OpenAPI document are made of."""

from __future__ import annotations

from typing import Any

from serve.gateway.routes.kserve_tensors import DATATYPES

__all__ = [
    "BASE64", "COUNT", "DATATYPE", "NUMBERS", "PARAMETERS", "TENSOR_NAME", "TEXT", "TEXTS", "Schema", "json_list",
    "json_object", "ref",
]  # fmt: skip

Schema = dict[str, Any]


def ref(name: str) -> Schema:
    """Refer to a schema among the components of the document."""
    return {"$ref": f"#/components/schemas/{name}"}


def json_object(properties: Schema, *, required: tuple[str, ...] = (), description: str = "") -> Schema:
    """Describe an object by its members."""
    found: Schema = {"type": "object", "properties": properties}
    if required:
        found["required"] = list(required)
    return {**found, "description": description} if description else found


def json_list(items: Schema, description: str = "") -> Schema:
    """Describe a list by its elements."""
    return {"type": "array", "items": items, **({"description": description} if description else {})}


NUMBERS = json_list({"type": "number"})
TEXT: Schema = {"type": "string"}
COUNT: Schema = {"type": "integer", "minimum": 0}
TEXTS = json_list(TEXT)

BASE64: Schema = {"type": "string", "contentEncoding": "base64"}
TENSOR_NAME: Schema = {"type": "string", "minLength": 1, "maxLength": 200}
PARAMETERS: Schema = {
    "type": "object",
    "description": "Texts, numbers or booleans: options of the frames, and timeout_ms",
    "additionalProperties": True,
}
DATATYPE: Schema = {
    "type": "string",
    "enum": list(DATATYPES),
}

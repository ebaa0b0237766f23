"""Status of a gRPC call: the one place where the HTTP statuses of the tree of errors become gRPC's.

By grpc/grpc, ``doc/statuscodes.md``: what a client may retry unchanged is UNAVAILABLE or RESOURCE_EXHAUSTED, what it
has to correct is INVALID_ARGUMENT.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import grpc
import orjson

from serve.errors import ServeError

__all__ = ["CODES", "CallError", "describe_error", "read_error", "status_code"]

CODES: Mapping[int, grpc.StatusCode] = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    406: grpc.StatusCode.INVALID_ARGUMENT,
    408: grpc.StatusCode.DEADLINE_EXCEEDED,
    413: grpc.StatusCode.INVALID_ARGUMENT,
    422: grpc.StatusCode.INVALID_ARGUMENT,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    499: grpc.StatusCode.CANCELLED,
    500: grpc.StatusCode.INTERNAL,
    502: grpc.StatusCode.INTERNAL,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
    507: grpc.StatusCode.RESOURCE_EXHAUSTED,
}


def status_code(http_status: int) -> grpc.StatusCode:
    """Return the gRPC status of an HTTP status of 400 or more."""
    fallback = grpc.StatusCode.INVALID_ARGUMENT if http_status < 500 else grpc.StatusCode.INTERNAL
    return CODES.get(http_status, fallback)


@dataclass(frozen=True)
class CallError:
    """Error of a call.

    Attributes:
        status: status of gRPC.
        message: what failed and what to change.
        code: stable code of the error, as in a response over HTTP; may be empty.
    """

    status: grpc.StatusCode
    message: str
    code: str


def describe_error(error: ServeError) -> CallError:
    """Return the error of a call that failed outside of the application."""
    return CallError(status_code(error.status), str(error), error.code)


def read_error(http_status: int, body: bytes) -> CallError:
    """Read an error response of the application."""
    try:
        document: Any = orjson.loads(body)
    except orjson.JSONDecodeError:
        document = None
    document = document if isinstance(document, dict) else {}
    error = document.get("error", "")
    if not isinstance(error, dict):  # under /v2
        error = {"message": error, "code": document.get("code", "")}
    return CallError(status_code(http_status), str(error.get("message", "")), str(error.get("code", "")))

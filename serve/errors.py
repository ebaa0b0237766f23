"""The tree of everything that can go wrong, each with an HTTP status and a stable code.

Knows nothing about who raises or who answers: no other module of ours is imported here.

    ServeError                          500  internal_error
    ├── ClientError                     400  bad_request            the caller can mend it
    │   ├── BadRequest                  400  bad_request            malformed envelope or JSON
    │   ├── UnknownOption               400  unknown_option         a query value we do not know
    │   ├── UndecodableFrame            422  undecodable_frame      not a cloud / image of this model
    │   ├── NonFinitePoints             422  non_finite_points      NaN or inf in a cloud
    │   ├── ModelNotFound               404  model_not_found
    │   ├── ReferenceRefused            403  reference_refused      a frame's address is not allowed here
    │   ├── ReferenceNotFound           404  reference_not_found    nothing lies at a frame's address
    │   ├── Unauthorized                401  unauthorized           no API key, or one we do not know
    │   ├── SlowRequest                 408  request_timeout        the body did not arrive in time
    │   └── FrameTooLarge               413  frame_too_large        over a configured limit
    ├── Overloaded                      429  overloaded             the queue is full
    ├── BackendBroken                   502  backend_broken         the backend broke its contract
    ├── NotReady                        503  not_ready              starting, draining, worker lost
    ├── DeadlineExceeded                504  deadline_exceeded
    ├── OutOfMemory                     507  out_of_memory          one frame alone is too large
    ├── InferenceFailed                 500  inference_failed       the network raised on a frame
    └── SetupError                      500  setup_error            before any request
        ├── SettingsError                    settings_error         contradictory or unknown setting
        ├── ArchiveError                     bad_archive            corrupt, foreign, altered
        │   └── ArchiveVersionError          archive_version        written by a version we cannot honour
        ├── CheckpointError                  bad_checkpoint         refused, or does not fit its config
        ├── ModelLookupError                 unknown_model          name not in the zoo index
        ├── StorageError                     storage_failed         a bucket, packed file or cache that failed
        │   ├── DownloadError                download_failed        offline, wrong hash, broken off
        │   ├── ObjectNotFound               object_not_found       no such object, bucket or member
        │   ├── AccessDenied                 access_denied          no credentials, or not allowed
        │   └── UriError                     bad_uri                not an address of ours, or carries secrets
        ├── SelfTestError                    self_test_failed       the golden frame came out different
        └── BackendStartError                backend_not_started    TorchServe, Java or the gateway did not come up
            └── ModelNotLoaded               model_not_loaded       a worker refused its archive
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

__all__ = [
    "AccessDenied",
    "ArchiveError",
    "ArchiveVersionError",
    "BackendBroken",
    "BackendStartError",
    "BadRequest",
    "CheckpointError",
    "ClientDisconnected",
    "ClientError",
    "DeadlineExceeded",
    "DownloadError",
    "FrameTooLarge",
    "InferenceFailed",
    "ModelLookupError",
    "ModelNotFound",
    "ModelNotLoaded",
    "NonFinitePoints",
    "NotAcceptable",
    "NotReady",
    "ObjectNotFound",
    "OutOfMemory",
    "Overloaded",
    "ReferenceNotFound",
    "ReferenceRefused",
    "SelfTestError",
    "ServeError",
    "SettingsError",
    "SetupError",
    "SlowRequest",
    "StorageError",
    "Unauthorized",
    "UndecodableFrame",
    "UnknownOption",
    "UriError",
    "error_body",
    "error_from_response",
]


class ServeError(Exception):
    """Base of the tree. ``str(error)`` is a sentence that says what to change."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"


class ClientDisconnected(Exception):
    """The client closed the connection before its answer; no answer can be sent."""


class ClientError(ServeError):
    """The caller can mend it; never logged with a traceback."""

    status = 400
    code = "bad_request"


class BadRequest(ClientError):
    """The envelope (JSON, multipart, framed batch) cannot be read."""


class UnknownOption(ClientError):
    """A per-request option has an unknown name or an impossible value."""

    code = "unknown_option"


class UndecodableFrame(ClientError):
    """The bytes are not a frame this model can take."""

    status = 422
    code = "undecodable_frame"


class NonFinitePoints(UndecodableFrame):
    """A point cloud holds NaN or infinite values."""

    code = "non_finite_points"


class ModelNotFound(ClientError):
    """No model of that name or version is loaded."""

    status = 404
    code = "model_not_found"


class Unauthorized(ClientError):
    """The request carries no API key, or one we do not know."""

    status = 401
    code = "unauthorized"


class SlowRequest(ClientError):
    """The request's body did not arrive within the time for it."""

    status = 408
    code = "request_timeout"


class FrameTooLarge(ClientError):
    """A frame is over a configured limit (bytes, points or pixels)."""

    status = 413
    code = "frame_too_large"


class NotAcceptable(ClientError):
    """The server writes none of the media types that the request accepts."""

    status = 406
    code = "not_acceptable"


class ReferenceRefused(ClientError):
    """A request names its frame by an address that this server does not read for clients."""

    status = 403
    code = "reference_refused"


class ReferenceNotFound(ClientError):
    """A request names its frame by an address where nothing lies."""

    status = 404
    code = "reference_not_found"


class Overloaded(ServeError):
    """The queue is full; the caller should retry later."""

    status = 429
    code = "overloaded"


class BackendBroken(ServeError):
    """The backend answered something its contract does not allow."""

    status = 502
    code = "backend_broken"


class NotReady(ServeError):
    """Starting, draining, or the worker was lost and the retry failed."""

    status = 503
    code = "not_ready"


class DeadlineExceeded(ServeError):
    """The caller's deadline passed before an answer was there."""

    status = 504
    code = "deadline_exceeded"


class OutOfMemory(ServeError):
    """One frame alone does not fit the device."""

    status = 507
    code = "out_of_memory"


class InferenceFailed(ServeError):
    """The network raised on this frame alone."""

    code = "inference_failed"


class SetupError(ServeError):
    """Something is wrong before any request could be taken."""

    code = "setup_error"


class SettingsError(SetupError):
    """A setting is unknown, impossible, or contradicts another."""

    code = "settings_error"


class ArchiveError(SetupError):
    """The archive is corrupt, altered, or not one of ours."""

    code = "bad_archive"


class ArchiveVersionError(ArchiveError):
    """The archive was written by a version this one cannot honour."""

    code = "archive_version"


class CheckpointError(SetupError):
    """The checkpoint is refused as unsafe, or does not fit its config."""

    code = "bad_checkpoint"


class ModelLookupError(SetupError):
    """No model of that name is in the zoo index."""

    code = "unknown_model"


class StorageError(SetupError):
    """A bucket, a packed file, a database or the cache failed, or holds something else than it should."""

    code = "storage_failed"


class DownloadError(StorageError):
    """A file could not be fetched or has the wrong hash."""

    code = "download_failed"


class ObjectNotFound(StorageError, FileNotFoundError):
    """There is no such object, bucket or member; also the ``FileNotFoundError`` mmengine's callers expect."""

    code = "object_not_found"


class AccessDenied(StorageError):
    """There are no credentials, or they do not allow this."""

    code = "access_denied"


class UriError(StorageError):
    """The text is no address of a kind we read, or it carries a user name or password."""

    code = "bad_uri"


class SelfTestError(SetupError):
    """The golden frame does not come out as recorded."""

    code = "self_test_failed"


class BackendStartError(SetupError):
    """TorchServe, or the Java it needs, did not come up."""

    code = "backend_not_started"


class ModelNotLoaded(BackendStartError):
    """A worker refused its archive; `archive` is its file name in the store."""

    code = "model_not_loaded"
    archive: str = ""


def error_body(error: ServeError, request_id: str | None = None) -> dict[str, Any]:
    """The one body every error is answered with (``{"error": {"code", "message"[, "request_id"]}}``)."""
    body: dict[str, Any] = {"code": error.code, "message": str(error)}
    if request_id is not None:
        body["request_id"] = request_id
    return {"error": body}


_BY_STATUS: dict[int, type[ServeError]] = {
    400: BadRequest,
    404: ModelNotFound,
    406: NotAcceptable,
    413: FrameTooLarge,
    422: UndecodableFrame,
    429: Overloaded,
    500: InferenceFailed,
    502: BackendBroken,
    503: NotReady,
    504: DeadlineExceeded,
    507: OutOfMemory,
}
_MAX_QUOTED_CHARS = 200


def error_from_response(status: int, answer: Any, text: str = "") -> ServeError:
    """The error an unsuccessful answer stands for.

    Args:
        status: HTTP status.
        answer: the parsed JSON body, or None where it is no JSON. Both our body
            ``{"error": {"code", "message"}}`` and TorchServe's ``{"code", "type", "message"}`` are read.
        text: the body as text, quoted where it is neither.

    Returns:
        An exception of the class that our ``code`` names, else of the class that goes with ``status``.
    """
    body = answer.get("error") if isinstance(answer, Mapping) else None
    if isinstance(body, Mapping):
        kind = _by_code(ServeError).get(str(body.get("code"))) or _by_status(status)
        return kind(str(body.get("message") or f"the server answered {status} without a message"))
    if isinstance(answer, Mapping) and "message" in answer:
        kind = _by_status(status)
        if answer.get("type") == "ServiceUnavailableException" and "queue" in str(answer["message"]).lower():
            kind = Overloaded
        return kind(f"the server answered {status}: {answer['message']}")
    return _by_status(status)(f"the server answered {status}: {text[:_MAX_QUOTED_CHARS] or '(empty body)'}")


def _by_status(status: int) -> type[ServeError]:
    fallback = ClientError if 400 <= status < 500 else BackendBroken
    return _BY_STATUS.get(status, fallback)


def _by_code(base: type[ServeError]) -> dict[str, type[ServeError]]:
    """``code`` → class over a whole tree; of classes that share a code the most general one wins."""
    found = {base.code: base}
    for child in base.__subclasses__():
        for code, kind in _by_code(child).items():
            found.setdefault(code, kind)
    return found

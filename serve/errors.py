"""Tree of errors, each with an HTTP status and a stable code.

ServeError                          500  internal_error
├── ClientError                     400  bad_request            the caller can correct it
│   ├── BadRequest                  400  bad_request            malformed body, form or JSON
│   ├── UnknownOption               400  unknown_option         unknown or invalid option
│   ├── UndecodableFrame            422  undecodable_frame      not a frame of this model
│   ├── NonFinitePoints             422  non_finite_points      NaN or inf in a point cloud
│   ├── ModelNotFound               404  model_not_found
│   ├── SessionNotFound             404  session_not_found      no such track session is open
│   ├── NotAcceptable               406  not_acceptable         no accepted media type is supported
│   ├── ReferenceRefused            403  reference_refused      the URI of a frame is not allowed
│   ├── ReferenceNotFound           404  reference_not_found    no object at the URI of a frame
│   ├── Unauthorized                401  unauthorized           missing or unknown API key
│   ├── SlowRequest                 408  request_timeout        the body did not arrive in time
│   └── FrameTooLarge               413  frame_too_large        over a configured limit
├── Overloaded                      429  overloaded             the queue is full
├── BackendBroken                   502  backend_broken         the backend broke its contract
├── NotReady                        503  not_ready              starting, draining or worker lost
├── DeadlineExceeded                504  deadline_exceeded
├── OutOfMemory                     507  out_of_memory          one frame alone is too large
├── InferenceFailed                 500  inference_failed       the network raised on a frame
└── SetupError                      500  setup_error            before any request
    ├── SettingsError                    settings_error         unknown, invalid or contradictory setting
    ├── ArchiveError                     bad_archive            corrupt, altered or unknown
    │   └── ArchiveVersionError          archive_version        unsupported format version
    ├── CheckpointError                  bad_checkpoint         unsafe, or does not fit its config
    ├── ModelLookupError                 unknown_model          name not in the zoo index
    ├── StorageError                     storage_failed         a bucket, packed file or cache that failed
    │   ├── DownloadError                download_failed        offline, wrong hash or interrupted
    │   ├── ObjectNotFound               object_not_found       no such object, bucket or member
    │   ├── AccessDenied                 access_denied          no credentials, or not allowed
    │   └── UriError                     bad_uri                unsupported URI, or one with credentials
    ├── SelfTestError                    self_test_failed       the golden frame does not match
    ├── MissingPackage                   missing_package        a package that only some uses need
    ├── DataSetError                     bad_data_set           missing, of another layout or other classes
    ├── UpstreamError                    upstream_failed        upstream's own program stopped
    └── BackendStartError                backend_not_started    TorchServe, Java or the gateway did not start
        └── ModelNotLoaded               model_not_loaded       a worker rejected its archive
"""

from __future__ import annotations

import re
import reprlib
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
    "DataSetError",
    "DeadlineExceeded",
    "DownloadError",
    "FrameTooLarge",
    "InferenceFailed",
    "MissingPackage",
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
    "SessionNotFound",
    "SettingsError",
    "SetupError",
    "SlowRequest",
    "StorageError",
    "Unauthorized",
    "UndecodableFrame",
    "UnknownOption",
    "UpstreamError",
    "UriError",
    "error_body",
    "error_from_response",
    "error_of_frame",
    "message_of",
    "quote",
]


class ServeError(Exception):
    """Base of the tree; ``str(error)`` says what failed and what to change."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"


class ClientDisconnected(Exception):
    """The client closed the connection before its answer; no answer can be sent."""


class ClientError(ServeError):
    """The caller can correct it; never logged with a traceback."""

    status = 400
    code = "bad_request"


class BadRequest(ClientError):
    """The request body (JSON, multipart or framed batch) cannot be parsed."""


class UnknownOption(ClientError):
    """An option has an unknown name or an invalid value."""

    code = "unknown_option"


class UndecodableFrame(ClientError):
    """The bytes are not a frame that this model accepts."""

    status = 422
    code = "undecodable_frame"


class NonFinitePoints(UndecodableFrame):
    """A point cloud contains NaN or infinite values."""

    code = "non_finite_points"


class ModelNotFound(ClientError):
    """No model of that name or version is loaded."""

    status = 404
    code = "model_not_found"


class Unauthorized(ClientError):
    """The request has no API key, or an unknown one."""

    status = 401
    code = "unauthorized"


class SlowRequest(ClientError):
    """The request body did not arrive within its time limit."""

    status = 408
    code = "request_timeout"


class FrameTooLarge(ClientError):
    """A frame exceeds a configured limit (bytes, points or pixels)."""

    status = 413
    code = "frame_too_large"


class SessionNotFound(ClientError):
    """No track session of that name is open."""

    status = 404
    code = "session_not_found"


class NotAcceptable(ClientError):
    """The server writes none of the media types that the request accepts."""

    status = 406
    code = "not_acceptable"


class ReferenceRefused(ClientError):
    """The URI of a frame is not allowed on this server."""

    status = 403
    code = "reference_refused"


class ReferenceNotFound(ClientError):
    """There is no object at the URI of a frame."""

    status = 404
    code = "reference_not_found"


class Overloaded(ServeError):
    """The limit of pending frames or bytes is reached; the caller should retry later."""

    status = 429
    code = "overloaded"


class BackendBroken(ServeError):
    """The backend's answer violates its contract."""

    status = 502
    code = "backend_broken"


class NotReady(ServeError):
    """The server is starting or draining, or lost a worker and the retry failed."""

    status = 503
    code = "not_ready"


class DeadlineExceeded(ServeError):
    """The deadline passed before the answer."""

    status = 504
    code = "deadline_exceeded"


class OutOfMemory(ServeError):
    """One frame alone exceeds the memory of the device."""

    status = 507
    code = "out_of_memory"


class InferenceFailed(ServeError):
    """The network raised an exception for this frame."""

    code = "inference_failed"


class SetupError(ServeError):
    """Setting up failed, before any request."""

    code = "setup_error"


class SettingsError(SetupError):
    """A setting is unknown or invalid, or contradicts another."""

    code = "settings_error"


class ArchiveError(SetupError):
    """The archive is corrupt, altered, or was not written by this project."""

    code = "bad_archive"


class ArchiveVersionError(ArchiveError):
    """The archive has a format version that this version does not support."""

    code = "archive_version"


class CheckpointError(SetupError):
    """The checkpoint is unsafe, or does not fit its config."""

    code = "bad_checkpoint"


class ModelLookupError(SetupError):
    """The zoo index has no model of that name."""

    code = "unknown_model"


class StorageError(SetupError):
    """A bucket, packed file, database or the cache failed, or has unexpected contents."""

    code = "storage_failed"


class DownloadError(StorageError):
    """A file could not be downloaded, or has the wrong hash.

    Attributes:
        is_final: whether another attempt would fail as well.
    """

    code = "download_failed"
    is_final: bool = False


class ObjectNotFound(StorageError, FileNotFoundError):
    """Object, bucket or member not found; also the ``FileNotFoundError`` that callers of mmengine expect."""

    code = "object_not_found"


class AccessDenied(StorageError):
    """Credentials are missing, or lack a permission."""

    code = "access_denied"


class UriError(StorageError):
    """The URI is invalid, has an unsupported scheme, or contains a user name or password."""

    code = "bad_uri"


class SelfTestError(SetupError):
    """The answer to the golden frame differs from the recorded one."""

    code = "self_test_failed"


class MissingPackage(SetupError, ImportError):
    """A package is not installed that only some uses need: upstream's code for one data set, videos."""

    code = "missing_package"


class DataSetError(SetupError):
    """A data set is missing, has another layout, or other classes than the model."""

    code = "bad_data_set"


class UpstreamError(SetupError):
    """A program of upstream stopped; the message is its own."""

    code = "upstream_failed"


class BackendStartError(SetupError):
    """TorchServe, its Java or the gateway did not start."""

    code = "backend_not_started"


class ModelNotLoaded(BackendStartError):
    """A worker rejected its archive; `archive` is its file name in the model store."""

    code = "model_not_loaded"
    archive: str = ""


# Of a message in a response; some name every option or part of a model.
MAX_MESSAGE_CHARS = 2000
# Of one value in it: what stands between quotes, or a run without spaces.
MAX_QUOTED_CHARS = 200
_LONG_VALUES = tuple(
    re.compile(pattern % MAX_QUOTED_CHARS)
    for pattern in (r"(?<!\w)'[^']{%d,}", r'(?<!\w)"[^"]{%d,}', r"\S{%d,}")
)


def quote(value: object) -> str:
    """Show a value of a client in a message: its `repr`, but no more of it than a reader needs."""
    return _QUOTE.repr(value)


def message_of(error: ServeError) -> str:
    """Return the message of an error as a response shows it.

    It has at most `MAX_MESSAGE_CHARS`, and of any value in it at most `MAX_QUOTED_CHARS`, however the error was raised.
    What is not Unicode in it (lone surrogates) is replaced, so that it can always be encoded.
    """
    message = str(error)
    if len(message) > MAX_MESSAGE_CHARS:
        message = f"{message[:MAX_MESSAGE_CHARS]}…"
    if len(message) > MAX_QUOTED_CHARS:
        for values in _LONG_VALUES:
            message = values.sub(lambda found: f"{found[0][:MAX_QUOTED_CHARS]}…", message)
    return message.encode(errors="replace").decode()


def error_body(error: ServeError, request_id: str | None = None) -> dict[str, Any]:
    """Build the JSON body of every error response: ``{"error": {"code", "message"[, "request_id"]}}``."""
    body: dict[str, Any] = {"code": error.code, "message": message_of(error)}
    if request_id is not None:
        body["request_id"] = request_id
    return {"error": body}


def error_of_frame(error: BaseException, kind: type[ServeError], what: str) -> ServeError:
    """Return the error with which a frame is answered: `error` itself if it is one of this tree.

    Args:
        error: whatever was raised.
        kind: class for all else, except for lack of memory.
        what: what failed, the beginning of the message.
    """
    if isinstance(error, ServeError):
        return error
    if isinstance(error, MemoryError):
        return OutOfMemory("a single frame exceeds the memory of the worker; send a smaller frame")
    found = kind(f"{what} ({type(error).__name__}); see the worker's log")
    found.__cause__ = error  # for the self-test; answers carry the message alone
    return found


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
_QUOTE = reprlib.Repr()
_QUOTE.maxstring = _QUOTE.maxother = _QUOTE.maxlong = 80
_QUOTE.maxlevel, _QUOTE.maxlist, _QUOTE.maxdict, _QUOTE.maxtuple = 2, 4, 4, 4


def error_from_response(status: int, answer: Any, text: str = "") -> ServeError:
    """Create the error that an unsuccessful response stands for.

    Args:
        status: HTTP status.
        answer: parsed JSON body; None if it is not JSON. Read are this project's ``{"error": {"code", "message"}}``
            and TorchServe's ``{"code", "type", "message"}``.
        text: body as text, quoted if it is neither.

    Returns:
        An exception of the class with that ``code``, else of the class for ``status``.
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
    return _by_status(status)(f"the server answered {status}: {text[:MAX_QUOTED_CHARS] or '(empty body)'}")


def _by_status(status: int) -> type[ServeError]:
    fallback = ClientError if 400 <= status < 500 else BackendBroken
    return _BY_STATUS.get(status, fallback)


def _by_code(base: type[ServeError]) -> dict[str, type[ServeError]]:
    """Map codes to the classes of a tree; of classes with the same code, the most general one wins."""
    found = {base.code: base}
    for child in base.__subclasses__():
        for code, kind in _by_code(child).items():
            found.setdefault(code, kind)
    return found

"""The tree of everything that can go wrong, each with an HTTP status and a stable code.

Knows nothing about who raises or who answers: no other module of ours is imported here.

    ServeError                          500  internal_error
    ├── ClientError                     400  bad_request            the caller can mend it
    │   ├── BadRequest                  400  bad_request            malformed envelope or JSON
    │   ├── UnknownOption               400  unknown_option         a query value we do not know
    │   ├── UndecodableFrame            422  undecodable_frame      not a cloud / image of this model
    │   ├── NonFinitePoints             422  non_finite_points      NaN or inf in a cloud
    │   ├── ModelNotFound               404  model_not_found
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
        ├── DownloadError                    download_failed        offline, wrong hash, broken off
        ├── SelfTestError                    self_test_failed       the golden frame came out different
        └── BackendStartError                backend_not_started    TorchServe or Java did not come up
"""

from __future__ import annotations

from typing import Any, ClassVar

__all__ = [
    "ArchiveError",
    "ArchiveVersionError",
    "BackendBroken",
    "BackendStartError",
    "BadRequest",
    "CheckpointError",
    "ClientError",
    "DeadlineExceeded",
    "DownloadError",
    "FrameTooLarge",
    "InferenceFailed",
    "ModelLookupError",
    "ModelNotFound",
    "NonFinitePoints",
    "NotReady",
    "OutOfMemory",
    "Overloaded",
    "SelfTestError",
    "ServeError",
    "SettingsError",
    "SetupError",
    "UndecodableFrame",
    "UnknownOption",
    "error_body",
]


class ServeError(Exception):
    """Base of the tree. ``str(error)`` is a sentence that says what to change."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"


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


class FrameTooLarge(ClientError):
    """A frame is over a configured limit (bytes, points or pixels)."""

    status = 413
    code = "frame_too_large"


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


class DownloadError(SetupError):
    """A file could not be fetched or has the wrong hash."""

    code = "download_failed"


class SelfTestError(SetupError):
    """The golden frame does not come out as recorded."""

    code = "self_test_failed"


class BackendStartError(SetupError):
    """TorchServe, or the Java it needs, did not come up."""

    code = "backend_not_started"


def error_body(error: ServeError, request_id: str | None = None) -> dict[str, Any]:
    """The one body every error is answered with (``{"error": {"code", "message"[, "request_id"]}}``)."""
    body: dict[str, Any] = {"code": error.code, "message": str(error)}
    if request_id is not None:
        body["request_id"] = request_id
    return {"error": body}

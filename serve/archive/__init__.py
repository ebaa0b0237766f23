"""Archive format (``.mar``): write, verify, extract and open, without torch."""

from serve.archive.format import (
    FORMAT,
    Archive,
    InferenceOptions,
    Metadata,
    check_identity,
    extract,
    open_directory,
    verify,
    write,
)

__all__ = [
    "FORMAT",
    "Archive",
    "InferenceOptions",
    "Metadata",
    "check_identity",
    "extract",
    "open_directory",
    "verify",
    "write",
]

"""Archive format (``.mar``): write, verify, extract and open, without torch."""

from serve.archive.format import (
    FORMAT,
    Archive,
    InferenceOptions,
    Metadata,
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
    "extract",
    "open_directory",
    "verify",
    "write",
]

"""The archive format (``.mar``): write, verify, extract and open; torch is not needed."""

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

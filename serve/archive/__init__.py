"""Archive format (``.mar``): write, verify, extract and open, without torch."""

from serve.archive.format import (
    Archive,
    extract,
    open_directory,
    read_expected,
    read_statistics,
    record_statistics,
    verify,
    write,
)
from serve.archive.metadata import FORMAT, InferenceOptions, Metadata, check_identity
from serve.archive.parts import check_parts_folder, write_parts

__all__ = [
    "FORMAT",
    "Archive",
    "InferenceOptions",
    "Metadata",
    "check_identity",
    "check_parts_folder",
    "extract",
    "open_directory",
    "read_expected",
    "read_statistics",
    "record_statistics",
    "verify",
    "write",
    "write_parts",
]

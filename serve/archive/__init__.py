"""Archive format (``.mar``): write, verify, extract and open, without torch."""

from serve.archive.format import Archive, extract, open_directory, verify, write
from serve.archive.metadata import FORMAT, InferenceOptions, Metadata, check_identity

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

"""Bounds of what is read of an archive, and the one boundary at which a failure becomes an `ArchiveError`.

An archive may come from a stranger. Its sizes, counts and names are compared with these bounds before anything is
unpacked or parsed; the largest archives of real models are far below them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from importlib.machinery import all_suffixes
from pathlib import PurePosixPath
from typing import Any

from serve.errors import ArchiveError, ServeError

__all__ = [
    "CONFIG",
    "EXPECTED",
    "HANDLER_FILE",
    "HANDLER_FILES",
    "MANIFEST",
    "MAX_COMPRESSION",
    "MAX_DIRECTORY_BYTES",
    "MAX_ENTRIES",
    "MAX_UNPACKED_BYTES",
    "METADATA",
    "WEIGHTS",
    "check_entry_name",
    "check_entry_size",
    "check_plain_name",
    "failures_as_archive_errors",
    "unique_members",
]

MANIFEST, METADATA, CONFIG, WEIGHTS = (
    "MAR-INF/MANIFEST.json",
    "model.json",
    "config.json",
    "weights.safetensors",
)
EXPECTED = "golden/expected.json"
# What torch-model-archiver packs for the handlers (`serve.archive.parts`); no import finds a name with a dot.
HANDLER_FILES = frozenset({"handlers.mmdet3d_handler.py", "handlers.mmdet_handler.py"})
HANDLER_FILE = b"# The handler is a module of the installed package mmdet3d-serve; nothing reads this file.\n"

MAX_ENTRIES = 20_000
MAX_DIRECTORY_BYTES = 8 << 20
MAX_UNPACKED_BYTES = 16 << 30
# Unpacked over packed bytes of a compressed entry; JSON of configs and detections has about 10.
MAX_COMPRESSION = 100
# Smaller entries may be compressed at any ratio.
_FREELY_COMPRESSED_BYTES = 1 << 20
_MAX_NAME_BYTES, _MAX_PART_BYTES, _MAX_DEPTH = 1024, 255, 32
_MAX_BYTES = {MANIFEST: 64 << 10, METADATA: 8 << 20, CONFIG: 16 << 20, EXPECTED: 64 << 20}
_MAX_BYTES_BELOW = {"golden": 256 << 20, "code": 64 << 20}
_FOLDERS = frozenset({"golden", "code", "extra"})
_IMPORTABLE = (*all_suffixes(), ".pyo", ".pyw", ".pyd", ".so", ".dll", ".dylib", ".pth")
_MAX_QUOTED_CHARS = 200


@contextlib.contextmanager
def failures_as_archive_errors(what: str) -> Iterator[None]:
    """Turn any exception of the block into an `ArchiveError` that says what could not be read, and why.

    Whatever a damaged or hostile file makes a parser raise (zlib.error, KeyError, RecursionError, MemoryError, …), the
    caller has one exception to handle. The errors of this project pass unchanged.

    Args:
        what: subject of the message.
    """
    try:
        yield
    except ServeError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"[:_MAX_QUOTED_CHARS]
        raise ArchiveError(f"{what} cannot be read ({reason}); copy or convert it again") from error


def unique_members(members: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object of a manifest, as `object_pairs_hook` of `json.loads`.

    Raises:
        ArchiveError: two of its members have one name: TorchServe might take the other one.
    """
    found = dict(members)
    if len(found) != len(members):
        raise ArchiveError("the manifest has two members of one name; convert the model again")
    return found


def check_plain_name(name: str) -> None:
    """Check that an entry lies inside the folder that a zip is unpacked in.

    Raises:
        ArchiveError: it does not; the message names the entry.
    """
    path = PurePosixPath(name)
    shown = repr(name[:_MAX_QUOTED_CHARS])
    if path.is_absolute() or ".." in path.parts or "\\" in name or name.endswith("/") or str(path) != name:
        raise ArchiveError(f"entry {shown} is not a plain path inside the archive")
    if not name.isprintable() or len(path.parts) > _MAX_DEPTH or len(name.encode()) > _MAX_NAME_BYTES:
        raise ArchiveError(f"entry {shown} has control characters, or a name that is too long")
    if any(len(part.encode()) > _MAX_PART_BYTES for part in path.parts):
        raise ArchiveError(f"entry {shown} has a name that is too long")


def check_entry_name(name: str) -> None:
    """Check that an entry lies at a known place, and cannot be imported because of its place.

    TorchServe puts the unpacked folder on ``sys.path`` before the standard library, so a module anywhere but below
    ``code/`` could be imported without trust, and ``code/__init__.py`` would shadow the module ``code``.

    Raises:
        ArchiveError: it does not, or as `check_plain_name`; the message names the entry.
    """
    check_plain_name(name)
    parts = PurePosixPath(name).parts
    shown = repr(name[:_MAX_QUOTED_CHARS])
    if name in HANDLER_FILES:
        return
    if f"handlers.{name}" in HANDLER_FILES:
        raise ArchiveError(
            f"entry {shown} is a copy of a handler, which is never run; give torch-model-archiver the one that "
            f"`mmdet3d-serve archive --parts FOLDER` writes: --handler FOLDER/handlers.{name.removesuffix('.py')}"
        )
    if name not in {MANIFEST, METADATA, CONFIG, WEIGHTS} and (parts[0] not in _FOLDERS or len(parts) < 2):
        raise ArchiveError(f"entry {shown} is not a part of an mmdet3d-serve archive")
    if parts[0] == "code":
        if len(parts) == 2 and parts[1].startswith("__init__."):
            raise ArchiveError(
                f"entry {shown} would shadow the standard module 'code'; pack a module of another name"
            )
    elif name.lower().endswith(_IMPORTABLE):
        raise ArchiveError(
            f"entry {shown} could be imported or loaded as code, which belongs below code/; leave it out, or name it "
            "in custom_imports"
        )


def check_entry_size(name: str, size: int, packed: int, compressed: bool) -> None:
    """Compare the sizes that an archive declares for an entry with the bounds.

    Args:
        name: of the entry.
        size: bytes, unpacked.
        packed: bytes in the archive.
        compressed: whether both may differ.

    Raises:
        ArchiveError: it is too large, or compressed too strongly.
    """
    most = _MAX_BYTES.get(name, _MAX_BYTES_BELOW.get(name.partition("/")[0], MAX_UNPACKED_BYTES))
    if size > most:
        raise ArchiveError(f"{name} has {size} bytes unpacked, more than {most}")
    if not compressed and size != packed:
        raise ArchiveError(f"{name} is not compressed, but has {size} bytes unpacked and {packed} packed")
    if size > _FREELY_COMPRESSED_BYTES and size > packed * MAX_COMPRESSION:
        raise ArchiveError(
            f"{name} is compressed {size // max(packed, 1)} times, more than {MAX_COMPRESSION}"
        )

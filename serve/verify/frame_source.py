"""Frames of commands as local files: from a file, a folder, or a URI of either.

    frames_at("data/", "lidar")                                   the folder's frames
    frames_at("s3://bucket/clouds/", "lidar")                     those of a folder of a bucket
    frames_at("ffrecord:///data/packed.ffr#velodyne", "lidar")    those of a folder in a packed file
    frames_at("ffrecord:///data/packed.ffr#velodyne/000008.bin", "lidar")

Frames at a URI are copied to a temporary folder, in which `serve.verify.endpoint.find_frames` selects them as in any
folder: a frame of several parts is a folder. Other folders below a folder are not searched.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from serve import storage
from serve.errors import UndecodableFrame
from serve.protocol.frame_spec import Modality
from serve.verify.endpoint import FRAME_MARKERS, find_frames
from serve.verify.reference import FRAME_SUFFIXES

__all__ = ["frames_at", "list_frame_files"]

_ENDINGS = tuple(ending for endings in FRAME_SUFFIXES.values() for ending in endings)


@contextmanager
def frames_at(source: str | Path, modality: Modality) -> Iterator[list[Path]]:
    """Yield the frames at a path or URI, sorted by name; copies are removed when the ``with`` block ends.

    Args:
        source: path or URI of a frame, or of a folder of frames.
        modality: kind of frames to select in a folder.

    Raises:
        UndecodableFrame: no such path, or no frame.
        StorageError: a URI cannot be read.
    """
    if not storage.is_remote(source):
        yield find_frames(source, modality)
        return
    where = storage.parse(source)
    single = where.scheme == "http" or where.name.lower().endswith(_ENDINGS)
    wanted = {str(source): PurePosixPath(where.name)} if single else list_frame_files(where)
    if not wanted:
        raise UndecodableFrame(
            f"{where} has no frame ({', '.join(_ENDINGS)}, or folders with {' or '.join(FRAME_MARKERS)})"
        )
    with tempfile.TemporaryDirectory(prefix="mmdet3d-serve-frames-") as scratch:
        folder = Path(scratch, _name(where) or "frames")
        for uri, name in tqdm(
            wanted.items(), desc="fetching", unit="file", disable=single or None, leave=False
        ):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(storage.read_bytes(uri))
        yield find_frames(folder / where.name if single else folder, modality)


def list_frame_files(where: storage.Location) -> dict[str, PurePosixPath]:
    """List the files of frames in a folder: URI → path below the folder, of one or two parts.

    Raises:
        UndecodableFrame: a name is not UTF-8, as JSON has to be.
        StorageError: as `serve.storage.list_files`.
    """
    uris = storage.list_files(str(where), (*_ENDINGS, *FRAME_MARKERS), recursive=True)
    for uri in uris:
        if not _is_utf8(uri):
            raise UndecodableFrame(f"the name {os.fsencode(uri)!r} of a frame is not UTF-8; rename it")
    names = {uri: _below(where, storage.parse(uri)) for uri in uris if not {".", ".."} & {*uri.split("/")}}
    whole = {name.parent for name in names.values() if name.name in FRAME_MARKERS}
    found: dict[str, PurePosixPath] = {}
    for uri, name in names.items():
        if len(name.parts) == 1 or (len(name.parts) == 2 and name.parent in whole):
            found[uri] = name
        elif where.scheme == "lmdb":  # which has no folders: a slash is part of the key
            found[uri] = PurePosixPath(name.name)
    return found


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _below(where: storage.Location, file: storage.Location) -> PurePosixPath:
    """Path of a file relative to the folder in which it was listed."""
    if where.scheme == "lmdb":
        return PurePosixPath(file.member.strip("/"))
    folder, path = (where.member, file.member) if where.scheme == "ffrecord" else (where.path, file.path)
    return PurePosixPath(path.lstrip("/")).relative_to(folder.strip("/"))


def _name(where: storage.Location) -> str:
    """Name of a folder for tables of frames; empty for a bucket or container."""
    name = PurePosixPath(where.member or where.path).name
    return "" if name == ".." else name

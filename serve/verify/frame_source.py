"""Frames of commands as local files: from a file, a folder, or a URI of either.

    frames_at("data/", "lidar")                                   the folder's frames
    frames_at("s3://bucket/clouds/", "lidar")                     those of a folder of a bucket
    frames_at("ffrecord:///data/packed.ffr#velodyne", "lidar")    those of a folder in a packed file
    frames_at("ffrecord:///data/packed.ffr#velodyne/000008.bin", "lidar")

Frames at a URI are copied to a temporary folder, in which `serve.verify.endpoint.find_frames` selects them as in any
folder. Folders below a folder are not searched.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from serve import storage
from serve.errors import UndecodableFrame
from serve.protocol.frames import Modality
from serve.verify.endpoint import find_frames
from serve.verify.reference import FRAME_SUFFIXES

__all__ = ["frames_at"]

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
    uris = [str(source)] if single else storage.list_files(source, _ENDINGS)
    if not uris:
        raise UndecodableFrame(f"{where} has no frame ({', '.join(_ENDINGS)})")
    with tempfile.TemporaryDirectory(prefix="mmdet3d-serve-frames-") as folder:
        paths = [Path(folder, storage.parse(uri).name) for uri in uris]
        for uri, path in zip(
            tqdm(uris, desc="fetching", unit="file", disable=single or None, leave=False), paths, strict=True
        ):
            path.write_bytes(storage.read_bytes(uri))
        yield find_frames(paths[0] if single else folder, modality)

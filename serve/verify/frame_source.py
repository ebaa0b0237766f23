"""Frames for commands: a file, a folder, or the address of either, as local files.

    frames_at("data/", "lidar")                                   the folder's frames
    frames_at("s3://bucket/clouds/", "lidar")                     those of a folder of a bucket
    frames_at("ffrecord:///data/packed.ffr#velodyne", "lidar")    those of a folder in a packed file
    frames_at("ffrecord:///data/packed.ffr#velodyne/000008.bin", "lidar")

What lies at an address is copied to a folder that is gone afterwards; which of it are frames is for
`serve.verify.endpoint` to say, as for any folder. Does not look into frames, nor into folders below a folder.
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
    """The frames meant by a path or address, sorted by name; copies are gone when the ``with`` block ends.

    Args:
        source: path or address of a frame, or of a folder of frames.
        modality: what kind of frames is looked for in a folder.

    Raises:
        UndecodableFrame: nothing is there, or no frame.
        StorageError: an address cannot be read.
    """
    if not storage.is_remote(source):
        yield find_frames(source, modality)
        return
    where = storage.parse(source)
    single = where.scheme == "http" or where.name.lower().endswith(_ENDINGS)
    uris = [str(source)] if single else storage.list_files(source, _ENDINGS)
    if not uris:
        raise UndecodableFrame(f"{where} holds no frame ({', '.join(_ENDINGS)})")
    with tempfile.TemporaryDirectory(prefix="mmdet3d-serve-frames-") as folder:
        paths = [Path(folder, storage.parse(uri).name) for uri in uris]
        for uri, path in zip(
            tqdm(uris, desc="fetching", unit="file", disable=single or None, leave=False), paths, strict=True
        ):
            path.write_bytes(storage.read_bytes(uri))
        yield find_frames(paths[0] if single else folder, modality)

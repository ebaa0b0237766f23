"""A small archive, and the ways to spoil it; its network is none, so that only reading it is tried."""

from __future__ import annotations

import json
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from serve import archive
from serve.archive import Metadata

METADATA = Metadata(
    name="small",
    version="1.0",
    modality="lidar",
    package="mmdet3d",
    classes=("Car", "Cyclist"),
    box_type_3d="LiDAR",
    load_dim=4,
    color_type=None,
    golden_frame="golden/frame.bin",
    source={"config": "c.py"},
    parts=("points",),
)
Entries = dict[str, bytes]


def small_archive(folder: Path, name: str = "small", **changes: Any) -> Path:
    """Write a valid archive ``NAME.mar`` into `folder`."""
    from dataclasses import replace

    weights = folder / "weights"
    weights.write_bytes(b"weights of no network")
    arguments: dict[str, Any] = {
        "config": {"model": {"type": "VoxelNet"}},
        "golden_frame": b"frame",
        "golden_expected": {"scores": []},
        **changes,
    }
    path = folder / f"{name}.mar"
    archive.write(path, replace(METADATA, name=name), weights=weights, force=True, **arguments)
    weights.unlink()
    return path


def entries_of(path: Path) -> Entries:
    """Contents by name."""
    with zipfile.ZipFile(path) as opened:
        return {name: opened.read(name) for name in opened.namelist()}


def pack(path: Path, entries: Mapping[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    """Write entries as they are."""
    with zipfile.ZipFile(path, "w", method) as out:
        for name, data in entries.items():
            out.writestr(name, data)
    return path


def with_fields(path: Path, change: Callable[[dict[str, Any]], object], entry: str = "model.json") -> Path:
    """Change the document of an entry, and its hash in ``model.json`` if it has one, in place."""
    import hashlib

    entries = entries_of(path)
    document = json.loads(entries[entry])
    change(document)
    entries[entry] = json.dumps(document).encode()
    if entry not in ("model.json", "MAR-INF/MANIFEST.json"):
        metadata = json.loads(entries["model.json"])
        metadata["files"][entry] = hashlib.sha256(entries[entry]).hexdigest()
        entries["model.json"] = json.dumps(metadata).encode()
    return pack(path, entries)


def add_declared(path: Path, added: Mapping[str, bytes]) -> Path:
    """Add entries with their hashes, as an author of a hostile archive would, in place."""
    import hashlib

    entries = {**entries_of(path), **added}
    metadata = json.loads(entries["model.json"])
    metadata["files"] |= {name: hashlib.sha256(data).hexdigest() for name, data in added.items()}
    entries["model.json"] = json.dumps(metadata).encode()
    return pack(path, entries)


def hide_entry(path: Path, name: str, data: bytes) -> Path:
    """Add an entry before the directory that the directory does not list, in place.

    Python does not see it; TorchServe, which reads from the front, unpacks it.
    """
    raw = path.read_bytes()
    with zipfile.ZipFile(path) as opened:
        directory = opened.start_dir
    head = struct.pack(
        "<4s5H3I2H", b"PK\x03\x04", 20, 0, 0, 0, 33, zlib.crc32(data), len(data), len(data), len(name), 0
    )
    hidden = head + name.encode() + data
    tail = bytearray(raw[directory:])
    (offset,) = struct.unpack_from("<I", tail, len(tail) - 6)
    struct.pack_into("<I", tail, len(tail) - 6, offset + len(hidden))
    path.write_bytes(raw[:directory] + hidden + tail)
    return path


def patch_directory(path: Path, field: int, form: str, value: int, entry: int = 0) -> Path:
    """Overwrite a field of an entry in the directory, at byte `field` of its record, in place."""
    raw = bytearray(path.read_bytes())
    at = raw.index(b"PK\x01\x02")
    for _ in range(entry):
        at = raw.index(b"PK\x01\x02", at + 4)
    struct.pack_into(form, raw, at + field, value)
    path.write_bytes(raw)
    return path


def patch_header(path: Path, field: int, form: str, value: int) -> Path:
    """Overwrite a field of the header before the first entry, in place."""
    raw = bytearray(path.read_bytes())
    struct.pack_into(form, raw, field, value)
    path.write_bytes(raw)
    return path

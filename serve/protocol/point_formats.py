"""Read point-cloud files that name their columns: PCD, PLY, LAS, LAZ, npz, structured npy.

Every size that a header claims is compared with the limits and with the bytes that follow before a reader sees it; the
readers are pypcd4, plyfile, laspy (with lazrs) and numpy. A file becomes a `PointTable`: columns by standard name.

Formats: PCD https://pointclouds.org/documentation/tutorials/pcd_file_format.html, PLY
http://paulbourke.net/dataformats/ply/, LAS 1.4-R15 (ASPRS), NEP 1 for npy.
"""

from __future__ import annotations

import io
import re
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from serve.errors import FrameTooLarge, UndecodableFrame
from serve.protocol import laz_process
from serve.protocol.batch import Bytes
from serve.settings import Limits

__all__ = ["MAX_COLUMNS", "NPY_MAGIC", "STANDARD_NAME", "PointTable", "read_point_file"]

NPY_MAGIC = b"\x93NUMPY"
# Spellings of a column, lower case, by its standard name.
ALIASES: Mapping[str, tuple[str, ...]] = {
    "x": ("x", "x_m"),
    "y": ("y", "y_m"),
    "z": ("z", "z_m"),
    "intensity": (
        "intensity",
        "intensities",
        "i",
        "reflectance",
        "reflectivity",
        "remission",
        "scalar_intensity",
    ),
    "ring": ("ring", "ring_id", "ring_index", "channel", "laser_id", "laser_number", "line", "beam"),
    "time": (
        "time",
        "t",
        "timestamp",
        "time_offset",
        "offset_time",
        "time_stamp",
        "dt",
        "gps_time",
        "gpstime",
    ),
    "elongation": ("elongation",),
    "red": ("red", "r", "diffuse_red"),
    "green": ("green", "g", "diffuse_green"),
    "blue": ("blue", "b", "diffuse_blue"),
}
STANDARD_NAME = {spelling: name for name, spellings in ALIASES.items() for spelling in spellings}
MAX_HEADER_BYTES = 64 << 10
MAX_COLUMNS = 128
MAX_BYTES_PER_POINT = 1024
# Of the process that unpacks LAZ: its libraries' address space, and CPU time.
LAZ_PROCESS_BYTES = 2 << 30
LAZ_SECONDS = 10


@dataclass(frozen=True)
class PointTable:
    """Columns of a point-cloud file.

    Attributes:
        format: format of the file, for messages.
        columns: (N,) arrays by standard name, else by the file's own; any numeric dtype.
        count: number of points N.
    """

    format: str
    columns: Mapping[str, npt.NDArray[Any]]
    count: int


def read_point_file(body: Bytes, name: str, limits: Limits) -> PointTable:
    """Read a file whose format `sniff` named.

    Raises:
        UndecodableFrame: damaged, or not a table of numeric columns.
        FrameTooLarge: more points than the limits allow.
    """
    with _errors_of(name):
        return _READERS[name](body, limits)


@contextmanager
def _errors_of(name: str) -> Iterator[None]:
    """Map whatever a reader raises to `UndecodableFrame`."""
    try:
        yield
    except (UndecodableFrame, FrameTooLarge):
        raise
    except Exception as error:  # readers raise anything: KeyError, struct.error, AssertionError, their own
        text = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise UndecodableFrame(f"not a readable {name} file: {text}") from None


def _table(name: str, columns: Mapping[str, npt.NDArray[Any]], count: int) -> PointTable:
    """Rename columns to their standard names; reject non-numeric columns and missing coordinates."""
    standard: dict[str, npt.NDArray[Any]] = {}
    for own, values in columns.items():
        if values.dtype.kind not in "fiu" or values.shape != (count,):
            continue  # a list property, a text: nothing that a model takes
        standard.setdefault(STANDARD_NAME.get(own.lower(), own), values)
    lacking = [axis for axis in "xyz" if axis not in standard]
    if lacking:
        raise UndecodableFrame(
            f"the {name} file has no coordinate {', '.join(lacking)}; its columns are {', '.join(columns) or 'none'}"
        )
    return PointTable(name, standard, count)


def _check_count(count: int, limits: Limits) -> None:
    if count < 0:
        raise UndecodableFrame(f"the header claims {count} points")
    if count > limits.max_points:
        raise FrameTooLarge(
            f"the point cloud has {count} points, the limit is {limits.max_points} (MMDET3D_SERVE_MAX_POINTS)"
        )


def _check_unpacked(name: str, count: int, bytes_per_point: int, limits: Limits) -> None:
    """Bound what a compressed file may become by what an uncompressed one may have."""
    if count * bytes_per_point > limits.max_frame_bytes:
        raise FrameTooLarge(
            f"the {name} has {count * bytes_per_point} bytes unpacked, the limit is {limits.max_frame_bytes} "
            "(MMDET3D_SERVE_MAX_FRAME_BYTES)"
        )


def _check_bytes(name: str, count: int, bytes_per_point: int, have: int) -> None:
    if bytes_per_point > MAX_BYTES_PER_POINT:
        raise UndecodableFrame(f"the {name} header claims {bytes_per_point} bytes per point")
    if count * bytes_per_point > have:
        raise UndecodableFrame(
            f"the {name} header claims {count} points of {bytes_per_point} bytes, but {have} bytes follow"
        )


# npy and npz


def _read_npy(body: Bytes, limits: Limits, name: str = "npy") -> PointTable:
    """Read a structured array; its field names are the columns."""
    stream = io.BytesIO(bytes(body[:MAX_HEADER_BYTES]))
    version = np.lib.format.read_magic(stream)
    read_header = (
        np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    )
    shape, is_fortran, dtype = read_header(stream)
    if dtype.hasobject:
        raise UndecodableFrame("the array holds Python objects; send numbers")
    if dtype.names is None:
        return _plain_array(body, stream.tell(), shape, "F" if is_fortran else "C", dtype, limits, name)
    if len(shape) != 1:
        raise UndecodableFrame(f"a structured array of points has one dimension, this one has shape {shape}")
    _check_count(shape[0], limits)
    _check_bytes(name, shape[0], dtype.itemsize, len(body) - stream.tell())
    array = np.frombuffer(body, dtype, shape[0], stream.tell())
    return _table(name, {column: array[column] for column in dtype.names}, shape[0])


def _plain_array(
    body: Bytes,
    start: int,
    shape: tuple[int, ...],
    order: Literal["C", "F"],
    dtype: np.dtype[Any],
    limits: Limits,
    name: str,
) -> PointTable:
    """Read a two-dimensional array, whose columns are numbered."""
    if len(shape) != 2 or dtype.kind not in "fiu" or not 3 <= shape[1] <= MAX_COLUMNS:
        raise UndecodableFrame(f"a point cloud is an array of numbers (N, columns), got {shape} {dtype}")
    _check_count(shape[0], limits)
    _check_bytes(name, shape[0], shape[1] * dtype.itemsize, len(body) - start)
    array = np.frombuffer(body, dtype, shape[0] * shape[1], start).reshape(shape, order=order)
    return PointTable(name, {str(k): array[:, k] for k in range(shape[1])}, shape[0])


def _read_npz(body: Bytes, limits: Limits) -> PointTable:
    """One array of an npz: the only one, or the one called ``points``."""
    with zipfile.ZipFile(io.BytesIO(bytes(body))) as archive:
        entries = {
            entry.filename.removesuffix(".npy"): entry
            for entry in archive.infolist()
            if entry.filename.endswith(".npy")
        }
        if not entries:
            raise UndecodableFrame("the zip holds no array (.npy); an npz is what numpy.savez writes")
        if len(entries) > 1 and "points" not in entries:
            raise UndecodableFrame(
                f"the npz holds {len(entries)} arrays ({', '.join(sorted(entries)[:8])}); send one, or call it points"
            )
        entry = entries.get("points") or next(iter(entries.values()))
        bound = min(limits.max_frame_bytes, limits.max_points * MAX_BYTES_PER_POINT)
        if entry.file_size > bound:
            raise FrameTooLarge(f"the array has {entry.file_size} bytes unpacked, the limit is {bound}")
        with archive.open(entry) as file:
            data = file.read(bound + 1)
        if len(data) > bound:
            raise FrameTooLarge(f"the array has more than {bound} bytes unpacked")
    if not data.startswith(NPY_MAGIC):
        raise UndecodableFrame("the array in the npz is not in NumPy's format")
    return _read_npy(data, limits, "npz")


# PCD

_PCD_SIZES = {
    ("F", 4),
    ("F", 8),
    ("I", 1),
    ("I", 2),
    ("I", 4),
    ("I", 8),
    ("U", 1),
    ("U", 2),
    ("U", 4),
    ("U", 8),
}


def _read_pcd(body: Bytes, limits: Limits) -> PointTable:
    from pypcd4.pypcd4 import PointCloud

    header, start = _pcd_header(body)
    sizes, counts = (
        [int(size) for size in header["SIZE"]],
        [int(n) for n in header.get("COUNT", ["1"] * len(header["SIZE"]))],
    )
    fields, kinds = header["FIELDS"], header["TYPE"]
    if not len(fields) == len(sizes) == len(kinds) == len(counts) or not 3 <= len(fields) <= MAX_COLUMNS:
        raise UndecodableFrame(
            f"the PCD header has {len(fields)} FIELDS, {len(sizes)} SIZE, {len(kinds)} TYPE and {len(counts)} COUNT"
        )
    if not set(zip(kinds, sizes, strict=True)) <= _PCD_SIZES or not all(0 < n <= MAX_COLUMNS for n in counts):
        raise UndecodableFrame(
            f"the PCD header has TYPE {' '.join(kinds)} of SIZE {' '.join(map(str, sizes))}"
        )
    count = (
        int(header["POINTS"][0]) if "POINTS" in header else int(header["WIDTH"][0]) * int(header["HEIGHT"][0])
    )
    _check_count(count, limits)
    width = sum(size * n for size, n in zip(sizes, counts, strict=True))
    encoding, left = header["DATA"][0], len(body) - start
    if encoding == "binary":
        _check_bytes("PCD", count, width, left)
    elif encoding == "binary_compressed":
        packed, unpacked = struct.unpack("<II", bytes(body[start : start + 8]))
        if (packed != left - 8 and packed > left - 8) or unpacked != count * width:
            raise UndecodableFrame(
                f"the PCD claims {packed} bytes compressed and {unpacked} unpacked; {left - 8} follow, {count} points "
                f"of {width} bytes are {count * width}"
            )
        _check_bytes("PCD", 0, width, left)
        _check_unpacked("PCD", count, width, limits)
    elif encoding == "ascii":
        _check_bytes("PCD", count, 2 * sum(counts) - 1, left)  # a digit and a blank at the least
    else:
        raise UndecodableFrame(
            f"the PCD has DATA {encoding[:40]}; ascii, binary and binary_compressed are read"
        )
    if count == 0:
        return _table("PCD", {field: np.empty(0, np.float32) for field in fields}, 0)
    cloud = PointCloud.from_fileobj(io.BytesIO(bytes(body)))  # type: ignore[arg-type]
    data = np.atleast_1d(cloud.pc_data)
    columns = {column: data[column] for column in data.dtype.names or ()}
    return _table("PCD", {**columns, **_packed_colour(columns)}, len(data))


def _pcd_header(body: Bytes) -> tuple[dict[str, list[str]], int]:
    """Words of each header line by its first, and where the data begins."""
    head = bytes(body[:MAX_HEADER_BYTES])
    found: dict[str, list[str]] = {}
    at = 0
    while "DATA" not in found:
        end = head.find(b"\n", at)
        if end < 0:
            raise UndecodableFrame(f"the PCD header has no DATA line within {MAX_HEADER_BYTES} bytes")
        words = head[at:end].decode("ascii").split()
        at = end + 1
        if words and not words[0].startswith("#"):
            found[words[0].upper()] = words[1:]
    lacking = [name for name in ("FIELDS", "SIZE", "TYPE", "DATA") if not found.get(name)]
    if lacking or ("POINTS" not in found and not {"WIDTH", "HEIGHT"} <= set(found)):
        raise UndecodableFrame(f"the PCD header lacks {', '.join(lacking) or 'POINTS'}")
    return found, at


def _packed_colour(columns: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
    """PCL's ``rgb`` and ``rgba``: 0x00RRGGBB in the bits of one float32 or uint32."""
    packed = next((columns[name] for name in ("rgb", "rgba") if name in columns), None)
    if packed is None or packed.dtype.itemsize != 4:
        return {}
    bits = np.ascontiguousarray(packed).view(np.uint32)
    return {name: (bits >> shift) & 0xFF for name, shift in (("red", 16), ("green", 8), ("blue", 0))}


# PLY

_PLY_BYTES = {
    **dict.fromkeys(("char", "int8", "uchar", "uint8"), 1),
    **dict.fromkeys(("short", "int16", "ushort", "uint16"), 2),
    **dict.fromkeys(("int", "int32", "uint", "uint32", "float", "float32"), 4),
    **dict.fromkeys(("double", "float64"), 8),
}


def _read_ply(body: Bytes, limits: Limits) -> PointTable:
    from plyfile import PlyData

    head = bytes(body[:MAX_HEADER_BYTES])
    ending = re.search(rb"end_header\r?\n", head)
    if ending is None:
        raise UndecodableFrame(f"the PLY header has no end_header within {MAX_HEADER_BYTES} bytes")
    lines = [line.split() for line in head[: ending.start()].decode("ascii").splitlines()]
    count, width = _vertex_size(lines)
    _check_count(count, limits)
    is_text = ["format", "ascii", "1.0"] in lines
    _check_bytes("PLY", count, width if not is_text else 1, len(body) - ending.end())
    # Only the vertices: faces and whatever follows may be long, and lists claim any length.
    rest = bytes(body[ending.end() :])
    header = [line for line in lines if line[:1] != ["comment"]]
    own = header[: _end_of_vertices(header)]
    alone = b"".join(" ".join(line).encode() + b"\n" for line in own) + b"end_header\n" + rest
    vertices = PlyData.read(io.BytesIO(alone))["vertex"].data
    return _table("PLY", {column: vertices[column] for column in vertices.dtype.names or ()}, len(vertices))


def _vertex_size(lines: Sequence[Sequence[str]]) -> tuple[int, int]:
    """Return the number of vertices and the bytes of each; they must be the first element, without lists."""
    elements = [line for line in lines if line[:1] == ["element"]]
    if not elements or elements[0][1] != "vertex":
        raise UndecodableFrame("the PLY's first element is not vertex")
    begin = lines.index(elements[0]) + 1
    width = 0
    for line in lines[begin : _end_of_vertices(lines)]:
        if line[:1] != ["property"]:
            continue
        if len(line) != 3 or line[1] not in _PLY_BYTES:
            raise UndecodableFrame(
                f"the PLY's vertices have a property that is no number: {' '.join(line)[:80]}"
            )
        width += _PLY_BYTES[line[1]]
    return int(elements[0][2]), width


def _end_of_vertices(lines: Sequence[Sequence[str]]) -> int:
    at = [k for k, line in enumerate(lines) if line[:1] == ["element"]]
    return at[1] if len(at) > 1 else len(lines)


# LAS and LAZ

_LAS_POINT_BYTES_AT, _LAS_VLRS_AT, _LAS_OLD_COUNT_AT, _LAS_COUNT_AT = 105, 100, 107, 247


def _read_las(body: Bytes, limits: Limits) -> PointTable:
    import laspy

    if len(body) < 227:
        raise UndecodableFrame(f"a LAS header has at least 227 bytes, the file has {len(body)}")
    head = bytes(body[:375])
    minor, vlrs = head[25], struct.unpack_from("<I", head, _LAS_VLRS_AT)[0]
    point_bytes = struct.unpack_from("<H", head, _LAS_POINT_BYTES_AT)[0]
    count = struct.unpack_from("<I", head, _LAS_OLD_COUNT_AT)[0]
    if minor >= 4 and len(head) >= _LAS_COUNT_AT + 8:
        count = struct.unpack_from("<Q", head, _LAS_COUNT_AT)[0]
    _check_count(count, limits)
    if vlrs > len(body) // 54:  # a variable length record has a header of 54 bytes
        raise UndecodableFrame(f"the LAS header claims {vlrs} records in {len(body)} bytes")
    is_compressed = bool(head[104] & 0x80)
    _check_bytes("LAS", 0 if is_compressed else count, point_bytes, len(body))
    if is_compressed:
        _check_unpacked("LAZ", count, point_bytes, limits)
        return _unpack_laz(body, count, limits)
    with laspy.open(io.BytesIO(bytes(body))) as reader:
        points = reader.read_points(count)
        columns = {axis: np.asarray(getattr(points, axis), dtype=np.float64) for axis in "xyz"}
        for own in points.point_format.dimension_names:
            if own not in ("X", "Y", "Z"):
                columns[own] = np.asarray(points[own])
    return _table("LAS", columns, len(points))


def _unpack_laz(body: Bytes, count: int, limits: Limits) -> PointTable:
    """Unpack in a process of its own, bounded in memory and time (see `serve.protocol.laz_process`)."""
    bound = LAZ_PROCESS_BYTES + 4 * limits.max_frame_bytes
    command = [sys.executable, "-P", laz_process.__file__, str(bound), str(LAZ_SECONDS), str(count)]
    try:
        ran = subprocess.run(
            command, input=bytes(body), capture_output=True, timeout=2 * LAZ_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise UndecodableFrame(f"the LAZ file was not unpacked within {2 * LAZ_SECONDS} s") from None
    if ran.returncode:
        reason = ran.stderr.decode(errors="replace").strip().splitlines()
        raise UndecodableFrame(f"not a readable LAZ file: {reason[-1][:200] if reason else ran.returncode}")
    with np.load(io.BytesIO(ran.stdout), allow_pickle=False) as unpacked:
        columns = {name: unpacked[name] for name in unpacked.files}
    return _table("LAZ", columns, len(columns["x"]))


_READERS: Mapping[str, Callable[[Bytes, Limits], PointTable]] = {
    "npy": _read_npy,
    "npz": _read_npz,
    "PCD": _read_pcd,
    "PLY": _read_ply,
    "LAS": _read_las,
}

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
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from serve.errors import FrameTooLarge, UndecodableFrame
from serve.protocol.batch import Bytes
from serve.protocol.las import read_las
from serve.protocol.point_table import (
    MAX_BYTES_PER_POINT,
    MAX_COLUMNS,
    PointTable,
    check_bytes,
    check_count,
    check_unpacked,
    standard_table,
)
from serve.settings import Limits

__all__ = ["NPY_MAGIC", "read_point_file"]

NPY_MAGIC = b"\x93NUMPY"
MAX_HEADER_BYTES = 64 << 10
# Entries of an npz; Python's reader makes an object of each.
MAX_NPZ_ENTRIES = 1000
_NPZ_DIRECTORY_ENTRY = b"PK\x01\x02"


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
    """Map whatever a reader raises to `UndecodableFrame`; a message that does not say what to do is completed."""
    advice = f"; send the whole {name} file as its program wrote it, or convert it to .npy"
    try:
        yield
    except UndecodableFrame as error:
        if ";" in str(error):
            raise
        raise UndecodableFrame(f"{error}{advice}") from None
    except FrameTooLarge:
        raise
    except Exception as error:  # readers raise anything: KeyError, struct.error, AssertionError, their own
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        text = re.sub(r" at 0x[0-9a-f]+", "", text)[
            :200
        ]  # objects of this process, as <ast.BinOp object at …>
        raise UndecodableFrame(f"not a readable {name} file: {text}{advice}") from None


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
    check_count(shape[0], limits)
    check_bytes(name, shape[0], dtype.itemsize, len(body) - stream.tell())
    array = np.frombuffer(body, dtype, shape[0], stream.tell())
    return standard_table(name, {column: array[column] for column in dtype.names}, shape[0])


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
    check_count(shape[0], limits)
    check_bytes(name, shape[0], shape[1] * dtype.itemsize, len(body) - start)
    array = np.frombuffer(body, dtype, shape[0] * shape[1], start).reshape(shape, order=order)
    return PointTable(name, {str(k): array[:, k] for k in range(shape[1])}, shape[0])


def _read_npz(body: Bytes, limits: Limits) -> PointTable:
    """One array of an npz: the only one, or the one called ``points``."""
    packed = bytes(body)
    if (count := packed.count(_NPZ_DIRECTORY_ENTRY)) > MAX_NPZ_ENTRIES:
        raise UndecodableFrame(f"the npz has {count} entries, the limit is {MAX_NPZ_ENTRIES}")
    with zipfile.ZipFile(io.BytesIO(packed)) as archive:
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
            raise FrameTooLarge(
                f"the array has {entry.file_size} bytes unpacked, the limit is {bound}; send fewer points, or raise "
                "MMDET3D_SERVE_MAX_FRAME_BYTES"
            )
        # Python's reader unpacks all of bzip2 and LZMA at once, whatever is asked for: gigabytes from a kilobyte.
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise UndecodableFrame(
                f"the npz is compressed by method {entry.compress_type}; send what numpy.savez or "
                "numpy.savez_compressed write"
            )
        with archive.open(entry) as file:
            data = file.read(bound + 1)
        if len(data) > bound:
            raise FrameTooLarge(
                f"the array has more than {bound} bytes unpacked, which is the limit; send fewer points, or raise "
                "MMDET3D_SERVE_MAX_FRAME_BYTES"
            )
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
_PCD_BLANKS = re.compile(rb"[ \t]{2,}|\t")
_PCD_MARGINS = re.compile(rb"^ | (?=\r?$)", re.MULTILINE)
_PCD_LINES = (
    "VERSION",
    "FIELDS",
    "SIZE",
    "TYPE",
    "COUNT",
    "WIDTH",
    "HEIGHT",
    "VIEWPOINT",
    "POINTS",
    "DATA",
)


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
    check_count(count, limits)
    width = sum(size * n for size, n in zip(sizes, counts, strict=True))
    encoding, left = header["DATA"][0], len(body) - start
    if encoding == "binary":
        check_bytes("PCD", count, width, left)
    elif encoding == "binary_compressed":
        packed, unpacked = struct.unpack("<II", bytes(body[start : start + 8]))
        if (packed != left - 8 and packed > left - 8) or unpacked != count * width:
            raise UndecodableFrame(
                f"the PCD claims {packed} bytes compressed and {unpacked} unpacked; {left - 8} follow, {count} points "
                f"of {width} bytes are {count * width}"
            )
        check_bytes("PCD", 0, width, left)
        check_unpacked("PCD", count, width, limits)
    elif encoding == "ascii":
        check_bytes("PCD", count, 2 * sum(counts) - 1, left)  # a digit and a blank at the least
    else:
        raise UndecodableFrame(
            f"the PCD has DATA {encoding[:40]}; ascii, binary and binary_compressed are read"
        )
    if count == 0:
        return standard_table("PCD", {field: np.empty(0, np.float32) for field in fields}, 0)
    # The reader wants lines that the format lets a writer leave out, and stumbles over a byte order mark.
    lines = {**header, "VERSION": ["0.7"], "COUNT": list(map(str, counts)), "POINTS": [str(count)]}
    lines |= {"WIDTH": [str(count)], "HEIGHT": ["1"], "VIEWPOINT": list("0001000")}
    whole = "".join(f"{name} {' '.join(lines[name])}\n" for name in _PCD_LINES).encode("latin-1")
    left_over = bytes(body[start:])
    if encoding == "ascii":  # the reader wants single blanks between numbers, and none around them
        left_over = _PCD_MARGINS.sub(b"", _PCD_BLANKS.sub(b" ", left_over))
    cloud = PointCloud.from_fileobj(io.BytesIO(whole + left_over))  # type: ignore[arg-type]
    data = np.atleast_1d(cloud.pc_data)
    if len(data) != count:
        raise UndecodableFrame(f"the PCD header claims {count} points, {len(data)} follow")
    columns = {column: data[column] for column in data.dtype.names or ()}
    return standard_table("PCD", {**columns, **_packed_colour(columns)}, len(data))


def _pcd_header(body: Bytes) -> tuple[dict[str, list[str]], int]:
    """Words of each header line by its first, and where the data begins."""
    head = bytes(body[:MAX_HEADER_BYTES])
    found: dict[str, list[str]] = {}
    at = 0
    while "DATA" not in found:
        end = head.find(b"\n", at)
        if end < 0:
            raise UndecodableFrame(f"the PCD header has no DATA line within {MAX_HEADER_BYTES} bytes")
        words = head[at:end].removeprefix(b"\xef\xbb\xbf").decode("latin-1").split()
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

_PLY_DTYPES = {
    **dict.fromkeys(("char", "int8"), "i1"),
    **dict.fromkeys(("uchar", "uint8"), "u1"),
    **dict.fromkeys(("short", "int16"), "i2"),
    **dict.fromkeys(("ushort", "uint16"), "u2"),
    **dict.fromkeys(("int", "int32"), "i4"),
    **dict.fromkeys(("uint", "uint32"), "u4"),
    **dict.fromkeys(("float", "float32"), "f4"),
    **dict.fromkeys(("double", "float64"), "f8"),
}


def _read_ply(body: Bytes, limits: Limits) -> PointTable:
    from plyfile import PlyData

    head = bytes(body[:MAX_HEADER_BYTES])
    ending = re.search(rb"end_header\r?\n", head)
    if ending is None:
        raise UndecodableFrame(f"the PLY header has no end_header within {MAX_HEADER_BYTES} bytes")
    lines = [line.split() for line in head[: ending.start()].decode("ascii").splitlines()]
    count, width = _vertex_size(lines)
    check_count(count, limits)
    is_text = ["format", "ascii", "1.0"] in lines
    check_bytes("PLY", count, width if not is_text else 1, len(body) - ending.end())
    # Only the vertices: faces and whatever follows may be long, and lists claim any length.
    rest = bytes(body[ending.end() :])
    header = [line for line in lines if line[:1] != ["comment"]]
    own = header[: _end_of_vertices(header)]
    if is_text:
        columns = _read_ply_text(own, rest, count)
        return standard_table("PLY", columns, count)
    alone = b"".join(" ".join(line).encode() + b"\n" for line in own) + b"end_header\n" + rest
    vertices = PlyData.read(io.BytesIO(alone))["vertex"].data
    return standard_table(
        "PLY", {column: vertices[column] for column in vertices.dtype.names or ()}, len(vertices)
    )


def _read_ply_text(
    header: Sequence[Sequence[str]], rest: bytes, count: int
) -> Mapping[str, npt.NDArray[Any]]:
    """Read vertices in text; plyfile takes 3 µs for each number, numpy a tenth of that."""
    dtype = np.dtype([(line[2], _PLY_DTYPES[line[1]]) for line in header if line[:1] == ["property"]])
    if count == 0:
        read = np.empty(0, dtype)
    else:
        read = np.loadtxt(io.BytesIO(rest), dtype, comments=None, max_rows=count, ndmin=1, encoding="ascii")
    if len(read) != count:
        raise UndecodableFrame(f"the PLY header claims {count} vertices, {len(read)} follow")
    return {name: read[name] for name in dtype.names or ()}


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
        if len(line) != 3 or line[1] not in _PLY_DTYPES:
            raise UndecodableFrame(
                f"the PLY's vertices have a property that is no number: {' '.join(line)[:80]}"
            )
        width += np.dtype(_PLY_DTYPES[line[1]]).itemsize
    return int(elements[0][2]), width


def _end_of_vertices(lines: Sequence[Sequence[str]]) -> int:
    at = [k for k, line in enumerate(lines) if line[:1] == ["element"]]
    return at[1] if len(at) > 1 else len(lines)


_READERS: Mapping[str, Callable[[Bytes, Limits], PointTable]] = {
    "npy": _read_npy,
    "npz": _read_npz,
    "PCD": _read_pcd,
    "PLY": _read_ply,
    "LAS": read_las,
}

"""Bytes to a point cloud in a model's columns.

The format is recognised by its first bytes (`sniff`), never by arithmetic on the length. A ``.bin`` has no signature
and no header: its numbers are compared with what a point cloud looks like (`check_layout`), so that another stride,
float64 or another byte order are noticed. What the client declares (``load_dim``, ``columns``) is taken at its word.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from serve.errors import FrameTooLarge, NonFinitePoints, UndecodableFrame, UnknownOption
from serve.protocol.batch import Bytes
from serve.protocol.point_formats import MAX_COLUMNS, NPY_MAGIC, STANDARD_NAME, PointTable, read_point_file
from serve.settings import Limits

__all__ = ["Columns", "PointLayout", "arrange", "check_layout", "decode_points", "parse_columns", "sniff"]

# A LiDAR sees some hundred metres; what is beyond is not a coordinate but misread bytes.
MAX_COORDINATE_M = 1e6
# First bytes to format. Formats without a reader are named, so that nobody's archive is taken for coordinates.
MAGIC: Sequence[tuple[bytes, str]] = (
    (NPY_MAGIC, "npy"),
    (b"# .PCD", "PCD"),
    (b"VERSION", "PCD"),
    (b"FIELDS", "PCD"),
    (b"ply\n", "PLY"),
    (b"ply\r", "PLY"),
    (b"LASF", "LAS"),
    (b"PK\x03\x04", "npz"),
)
UNREADABLE: Sequence[tuple[bytes, str]] = (
    (b"\x1f\x8b", "gzip"),
    (b"\x28\xb5\x2f\xfd", "Zstandard"),
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ\x00", "xz"),
    (b"\x89HDF\r\n", "HDF5"),
    (b"PAR1", "Parquet"),
    (b"ARROW1", "Arrow"),
    (b"ASTM-E57", "E57"),
    (b"DRACO", "Draco"),
    (b"#ROSBAG", "ROS bag"),
    (b"SQLite format 3", "SQLite (a ROS 2 bag?)"),
    (b"\x89MCAP", "MCAP"),
    (b"\x89PNG", "PNG image"),
    (b"\xff\xd8\xff", "JPEG image"),
    (b"GIF8", "GIF image"),
    (b"BM", "BMP image"),
    (b"RIFF", "RIFF (WebP?)"),
    (b"%PDF", "PDF"),
    (b"\x80\x02", "pickle"),
    (b"\x80\x03", "pickle"),
    (b"\x80\x04", "pickle"),
    (b"\x80\x05", "pickle"),
    (b"<!DO", "HTML"),
    (b"<htm", "HTML"),
)
_PRINTABLE = frozenset(b"\t\n\r" + bytes(range(32, 127)))
_COLUMN = re.compile(r"\s*([A-Za-z_][A-Za-z0-9_]{0,63})\s*(?:=\s*([-+0-9.eE]{1,32}))?\s*")


@dataclass(frozen=True)
class PointLayout:
    """Columns of the points that a model takes.

    Attributes:
        columns: standard name of each, in order.
        used: indices of those that the model looks at; others may be missing in a file that names its columns.
    """

    columns: tuple[str, ...]
    used: frozenset[int]

    @classmethod
    def default(cls, load_dim: int, *, is_depth: bool, used: Sequence[int] | None = None) -> PointLayout:
        """Give the usual columns of a sensor: LiDAR (nuScenes' order) or depth camera."""
        usual = (
            ("x", "y", "z", "red", "green", "blue")
            if is_depth
            else ("x", "y", "z", "intensity", "ring", "time")
        )
        names = (*usual[:load_dim], *(f"column_{k}" for k in range(len(usual), load_dim)))
        return cls(names, frozenset(range(load_dim) if used is None else used))


@dataclass(frozen=True)
class Columns:
    """What a client declares of its columns (``columns=x,y,z,intensity=0``).

    Attributes:
        names: standard name of each column of the file, in order.
        constants: values of columns that the file lacks.
    """

    names: tuple[str, ...]
    constants: Mapping[str, float]


def parse_columns(text: str) -> Columns:
    """Parse the option ``columns``: names in the file's order, and constants for what it lacks.

    Raises:
        UnknownOption: not of that form.
    """
    names: list[str] = []
    constants: dict[str, float] = {}
    for part in text.split(",")[: MAX_COLUMNS + 1]:
        found = _COLUMN.fullmatch(part)
        if found is None or len(names) == MAX_COLUMNS:
            raise UnknownOption(
                f"columns: '{part[:80]}' is no column name or name=value, as in x,y,z,intensity=0"
            )
        name = STANDARD_NAME.get(found[1].lower(), found[1])
        if name in names or name in constants:
            raise UnknownOption(f"columns: '{name}' stands twice")
        if found[2] is None:
            names.append(name)
            continue
        try:
            constants[name] = float(found[2])
        except ValueError:
            raise UnknownOption(f"columns: {name}={found[2]} is no number") from None
    return Columns(tuple(names), constants)


def decode_points(
    body: Bytes,
    layout: PointLayout,
    limits: Limits,
    *,
    columns: str | None = None,
    load_dim: int | None = None,
    num_points: int | None = None,
) -> npt.NDArray[np.float32]:
    """Decode a point cloud of any format that is read.

    Args:
        body: the file.
        layout: the model's columns.
        limits: bounds.
        columns: the client's word on the file's columns (see `parse_columns`).
        load_dim: the client's word on the numbers per point.
        num_points: the client's word on the number of points.

    Returns:
        (N, len(layout.columns)) float32.

    Raises:
        UnknownOption: `columns` cannot be parsed.
        UndecodableFrame: no point cloud, a damaged one, or one that cannot be what it is declared to be.
        FrameTooLarge: more points than the limits allow.
        NonFinitePoints: NaN or inf among the points.
    """
    declared = parse_columns(columns) if columns else None
    width = len(declared.names) if declared else len(layout.columns)
    if load_dim is not None and load_dim != width:
        raise UndecodableFrame(
            f"the request declares {load_dim} floats per point, "
            + (f"and {width} columns" if declared else f"this model takes {width}")
        )
    kind = sniff(body)
    if kind is None:
        read = _read_bin(body, width, limits, is_empty=num_points == 0)
        if declared is None and load_dim is None and num_points is None:
            check_layout(body, width)
        table = _named(
            PointTable("bin", {str(k): read[:, k] for k in range(width)}, len(read)), declared, layout
        )
        points = read if declared is None else arrange(table, layout, declared.constants)
    else:
        table = _named(read_point_file(body, kind, limits), declared, layout)
        points = arrange(table, layout, declared.constants if declared else {})
    if num_points is not None and num_points != len(points):
        raise UndecodableFrame(
            f"the request declares {num_points} points, the frame holds {len(points)} of {width} floats"
        )
    return _checked(points)


def _checked(points: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    if not np.isfinite(points).all():
        bad = int((~np.isfinite(points)).any(axis=1).sum())
        raise NonFinitePoints(f"{bad} of {len(points)} points hold NaN or inf; remove them before sending")
    if len(points) and (reach := float(np.abs(points[:, :3]).max())) > MAX_COORDINATE_M:
        raise UndecodableFrame(
            f"coordinates reach {reach:.3g} m: these bytes are not float32 little-endian points of {points.shape[1]} "
            "numbers starting with x, y, z in metres"
        )
    return points


def _named(table: PointTable, declared: Columns | None, layout: PointLayout) -> PointTable:
    """Name the columns of a table that numbers them: as declared, else as the model's."""
    if "0" not in table.columns:
        return table
    names = declared.names if declared else layout.columns
    if len(table.columns) != len(names):
        raise UndecodableFrame(
            f"the {table.format} array is ({table.count}, {len(table.columns)}), this model takes "
            f"(N, {len(names)}); name its columns, as in columns=x,y,z,intensity"
        )
    return PointTable(table.format, dict(zip(names, table.columns.values(), strict=True)), table.count)


def _read_bin(body: Bytes, width: int, limits: Limits, *, is_empty: bool) -> npt.NDArray[np.float32]:
    if len(body) == 0 and not is_empty:
        raise UndecodableFrame(
            "the body is empty; an empty cloud is sent with num_points=0, or as .npy (0, load_dim)"
        )
    # Float32 coordinates always have bytes outside the printable range; text never has.
    head = bytes(body[:512])
    if head and all(byte in _PRINTABLE for byte in head):
        raise UndecodableFrame(
            'the body is text, not a point cloud; send the bytes of a .bin or .npy, or base64 as JSON {"b64": …}'
        )
    stride = 4 * width
    if len(body) % stride:
        raise UndecodableFrame(
            f"{len(body)} bytes are not a whole number of points: this model takes {width} float32 per point "
            f"({stride} bytes); a file of other columns is named by columns=x,y,z,…"
        )
    if len(body) // stride > limits.max_points:
        raise FrameTooLarge(
            f"the point cloud has {len(body) // stride} points, the limit is {limits.max_points}"
        )
    return np.frombuffer(body, dtype="<f4").astype(np.float32, copy=False).reshape(-1, width)


def sniff(body: Bytes) -> str | None:
    """Name the format of a file by its first bytes; None: no format with a signature, such as a ``.bin``.

    Raises:
        UndecodableFrame: a known format that holds no point cloud, or one without a reader here.
    """
    head = bytes(body[:16])
    for magic, name in MAGIC:
        if head.startswith(magic):
            return name
    for magic, name in UNREADABLE:
        if head.startswith(magic) and _is_not_points(magic, body):
            raise UndecodableFrame(
                f"the body is {name}, not a point cloud; send .bin, .npy, .npz, PCD, PLY, LAS or LAZ, uncompressed"
            )
    return None


def _is_not_points(magic: bytes, body: Bytes) -> bool:
    """Whether so short a signature is no coincidence of a first coordinate.

    A first coordinate of a ``.bin`` may be any float32: one whose bytes equal a signature of two or three bytes is
    possible, so the length has to disagree with every stride of 3 to 8 floats as well.
    """
    return len(magic) >= 4 or len(body) % 4 != 0 or not _plausible(body)


def _plausible(body: Bytes) -> bool:
    """Whether the first numbers read as float32 are coordinates: finite, and below 10 km."""
    head = np.frombuffer(bytes(body[: min(len(body), 4096) // 4 * 4]), dtype="<f4")
    with np.errstate(invalid="ignore"):
        return bool(len(head) and (np.isfinite(head) & (np.abs(head) < 1e4)).mean() > 0.99)


# A layout is called wrong where another explains the numbers so much better that no real cloud does by chance.
_SAMPLE_FLOATS = 1 << 12
_MIN_FLOATS = 512
_STRIDES = range(3, 9)
_FAR_BETTER = 0.35


def check_layout(body: Bytes, width: int) -> None:
    """Refuse a ``.bin`` whose numbers are surely not float32 little-endian points of `width` columns.

    Numbers of another type or byte order are hardly ever of the size of coordinates. Of the right stride, numbers one
    stride apart are of the same column and mostly of neighbouring points: they differ far less than numbers any
    other distance apart.

    Raises:
        UndecodableFrame: names what the bytes look like, and how to declare what they are.
    """
    sample = bytes(body[: 4 * _SAMPLE_FLOATS])
    sample = sample[: len(sample) // 8 * 8]
    if len(sample) < 4 * _MIN_FLOATS:
        return
    plausible = _plausible_share(np.frombuffer(sample, "<f4"))
    for kind, name in ((">f4", "big-endian float32"), ("<f8", "float64"), (">f8", "big-endian float64")):
        if plausible < 0.9 and _plausible_share(np.frombuffer(sample, kind)) > 0.98:
            raise UndecodableFrame(
                f"the body looks like {name}, not float32 little-endian; convert it, or send .npy, "
                "which says what it is"
            )
    best = _likely_stride(np.frombuffer(sample, "<f4"), width)
    if best is not None and (len(body) // 4) % best == 0:
        raise UndecodableFrame(
            f"the body looks like points of {best} numbers, this model takes {width}; name the columns, as in "
            f"columns=x,y,z,…, or declare load_dim={width} if that is what they are"
        )


def _plausible_share(numbers: npt.NDArray[np.floating]) -> float:
    """Share of numbers that a coordinate, an intensity, a colour or a zero could be."""
    with np.errstate(invalid="ignore"):
        size = np.abs(numbers)
        return float(((size == 0) | ((size > 1e-6) & (size < 1e5))).mean())


def _likely_stride(numbers: npt.NDArray[np.float32], width: int) -> int | None:
    """Give another stride that explains the numbers far better than `width`; None: none does."""
    with np.errstate(invalid="ignore", over="ignore"):
        clipped = np.clip(np.nan_to_num(numbers), -1e3, 1e3)
    change = {
        stride: float(np.median(np.abs(clipped[stride:] - clipped[:-stride])))
        for stride in {*_STRIDES, width}
    }
    best = min(_STRIDES, key=lambda stride: change[stride])
    return best if best != width and change[best] < _FAR_BETTER * change[width] else None


def arrange(
    table: PointTable, layout: PointLayout, constants: Mapping[str, float]
) -> npt.NDArray[np.float32]:
    """Put columns into the order a model takes.

    Args:
        table: what the file holds.
        layout: the model's columns; those that it does not look at may be missing and become 0.
        constants: values that the client states for columns that the file lacks.

    Returns:
        (N, len(layout.columns)) float32.

    Raises:
        UndecodableFrame: a column that the model looks at is missing.
    """
    missing = [
        name
        for k, name in enumerate(layout.columns)
        if k in layout.used and name not in table.columns and name not in constants
    ]
    if missing:
        raise UndecodableFrame(
            f"the {table.format} file has no column {', '.join(missing)}, which the model uses; it has "
            f"{', '.join(table.columns) or 'none'}. State a value, as in columns={missing[0]}=0, or send the column"
        )
    points = np.zeros((table.count, len(layout.columns)), dtype=np.float32)
    with np.errstate(over="ignore"):  # too large a double becomes inf and is refused with the others
        for k, name in enumerate(layout.columns):
            if name in table.columns:
                points[:, k] = table.columns[name]
            else:
                points[:, k] = constants.get(name, 0.0)
    return points

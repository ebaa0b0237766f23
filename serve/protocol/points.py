"""Bytes to a point cloud in a model's columns.

The format is recognised by its first bytes (`sniff`), never by the length of the file. A ``.bin`` has no signature and
no header, so that the plausibility of its numbers is checked (`check_layout`): another stride, float64 and another byte
order are noticed. A layout that the client declares (``load_dim``, ``columns``) is not questioned.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from serve.errors import FrameTooLarge, NonFinitePoints, UndecodableFrame, UnknownOption
from serve.protocol.batch import Bytes
from serve.protocol.point_formats import NPY_MAGIC, read_point_file
from serve.protocol.point_table import MAX_COLUMNS, STANDARD_NAME, PointTable
from serve.settings import Limits

__all__ = ["Columns", "PointLayout", "arrange", "check_layout", "decode_points", "parse_columns", "sniff"]

# A LiDAR sees some hundred metres; larger coordinates are misread bytes.
MAX_COORDINATE_M = 1e6
# Signature → format. Formats without a reader are listed too, so that their bytes do not pass for coordinates.
MAGIC: Sequence[tuple[bytes, str]] = (
    (NPY_MAGIC, "npy"),
    (b"# .PCD", "PCD"),
    (b"VERSION", "PCD"),
    (b"FIELDS", "PCD"),
    (b"ply\n", "PLY"),
    (b"ply\r", "PLY"),
    (b"LASF", "LAS"),
    (b"PK\x03\x04", "npz"),
    (b"PK\x05\x06", "npz"),  # without entries
)
# A header that begins with another comment, a blank line or a byte order mark.
_PCD_HEADER = re.compile(rb"[\s\xef\xbb\xbf#].{0,4096}?^FIELDS .{0,4096}?^DATA ", re.DOTALL | re.MULTILINE)
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
_PCD_HEAD_BYTES = 8192
_PRINTABLE = frozenset(b"\t\n\r" + bytes(range(32, 127)))
_COLUMN = re.compile(r"\s*([A-Za-z_][A-Za-z0-9_]{0,63})\s*(?:=\s*([-+0-9.eE]{1,32}))?\s*")


@dataclass(frozen=True)
class PointLayout:
    """Columns of the points that a model accepts.

    Attributes:
        columns: standard names, in order.
        used: indices of the columns that the model uses; a file that names its columns may lack the others.
    """

    columns: tuple[str, ...]
    used: frozenset[int]

    @classmethod
    def default(cls, load_dim: int, *, is_depth: bool, used: Sequence[int] | None = None) -> PointLayout:
        """Return the usual columns of a sensor: LiDAR (nuScenes' order) or depth camera."""
        usual = (
            ("x", "y", "z", "red", "green", "blue")
            if is_depth
            else ("x", "y", "z", "intensity", "ring", "time")
        )
        names = (*usual[:load_dim], *(f"column_{k}" for k in range(len(usual), load_dim)))
        return cls(names, frozenset(range(load_dim) if used is None else used))


@dataclass(frozen=True)
class Columns:
    """Columns as declared by a client (``columns=x,y,z,intensity=0``).

    Attributes:
        names: standard name of each column of the file, in order.
        constants: values of columns that the file lacks.
    """

    names: tuple[str, ...]
    constants: Mapping[str, float]


def parse_columns(text: str) -> Columns:
    """Parse the option ``columns``: names in the file's order, and constants for missing columns.

    Raises:
        UnknownOption: the text does not have this form.
    """
    names: list[str] = []
    constants: dict[str, float] = {}
    for part in text.split(",")[: MAX_COLUMNS + 1]:
        found = _COLUMN.fullmatch(part)
        if found is None or len(names) == MAX_COLUMNS:
            raise UnknownOption(
                f"columns: '{part[:80]}' is neither a column name nor name=value, as in x,y,z,intensity=0"
            )
        name = STANDARD_NAME.get(found[1].lower(), found[1])
        if name in names or name in constants:
            raise UnknownOption(f"columns: '{name}' occurs twice")
        if found[2] is None:
            names.append(name)
            continue
        try:
            constants[name] = float(found[2])
        except ValueError:
            raise UnknownOption(f"columns: {name}={found[2]} is not a number") from None
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
    """Decode a point cloud of any supported format.

    Args:
        body: the file.
        layout: the model's columns.
        limits: limits on the number of points.
        columns: columns of the file as declared by the client (see `parse_columns`).
        load_dim: numbers per point as declared by the client.
        num_points: number of points as declared by the client.

    Returns:
        (N, len(layout.columns)) float32.

    Raises:
        UnknownOption: `columns` cannot be parsed.
        UndecodableFrame: not a point cloud, or a corrupt one, or it contradicts the declarations.
        FrameTooLarge: more points than the limits allow.
        NonFinitePoints: the points contain NaN or inf.
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
        table = _name_columns(
            PointTable("bin", {str(k): read[:, k] for k in range(width)}, len(read)), declared, layout
        )
        points = read if declared is None else arrange(table, layout, declared.constants)
    else:
        table = _name_columns(read_point_file(body, kind, limits), declared, layout)
        points = arrange(table, layout, declared.constants if declared else {})
    if num_points is not None and num_points != len(points):
        raise UndecodableFrame(
            f"the request declares {num_points} points, the frame holds {len(points)} of {width} floats"
        )
    return _check_points(points, kind)


def _check_points(points: npt.NDArray[np.float32], kind: str | None) -> npt.NDArray[np.float32]:
    if not np.isfinite(points).all():
        bad = int((~np.isfinite(points)).any(axis=1).sum())
        raise NonFinitePoints(f"{bad} of {len(points)} points contain NaN or inf; remove them before sending")
    if len(points) and (reach := float(np.abs(points[:, :3]).max())) > MAX_COORDINATE_M:
        expected = (
            f"expected little-endian float32 points of {points.shape[1]} numbers that start with x, y, z in metres"
            if kind is None
            else "subtract the sensor's place, so that x, y, z are in metres from the sensor"
        )
        raise UndecodableFrame(f"coordinates reach {reach:.3g} m; {expected}")
    return points


def _name_columns(table: PointTable, declared: Columns | None, layout: PointLayout) -> PointTable:
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
            "the body is empty; send an empty point cloud with num_points=0, or as .npy of shape (0, load_dim)"
        )
    # Float32 coordinates always contain bytes outside the printable range; text never does.
    head = bytes(body[:512])
    if head and all(byte in _PRINTABLE for byte in head):
        raise UndecodableFrame(
            'the body is text, not a point cloud; send the bytes of a .bin or .npy file, or base64 as JSON {"b64": …}'
        )
    stride = 4 * width
    if len(body) % stride:
        raise UndecodableFrame(
            f"{len(body)} bytes are not a whole number of points; this model takes {width} float32 per point "
            f"({stride} bytes); declare other columns with columns=x,y,z,…"
        )
    if len(body) // stride > limits.max_points:
        raise FrameTooLarge(
            f"the point cloud has {len(body) // stride} points, the limit is {limits.max_points}"
        )
    return np.frombuffer(body, dtype="<f4").astype(np.float32, copy=False).reshape(-1, width)


def sniff(body: Bytes) -> str | None:
    """Recognise the format of a file by its first bytes; None if it has no signature, such as a ``.bin``.

    Raises:
        UndecodableFrame: a known format without point clouds, or without a reader here.
    """
    head = bytes(body[:16])
    for magic, name in MAGIC:
        if head.startswith(magic):
            return name
    if _PCD_HEADER.match(bytes(body[:_PCD_HEAD_BYTES])):
        return "PCD"
    for magic, name in UNREADABLE:
        if head.startswith(magic) and _is_not_points(magic, body):
            raise UndecodableFrame(
                f"the body is {name}, not a point cloud; send .bin, .npy, .npz, PCD, PLY, LAS or LAZ, uncompressed"
            )
    return None


def _is_not_points(magic: bytes, body: Bytes) -> bool:
    """Return whether a signature is more than a coincidence with the first coordinate.

    A first coordinate of a ``.bin`` may be any float32: one whose bytes equal a signature of two or three bytes is
    possible, so the length has to disagree with every stride of 3 to 8 floats as well.
    """
    return len(magic) >= 4 or len(body) % 4 != 0 or not _plausible(body)


def _plausible(body: Bytes) -> bool:
    """Return whether the first numbers, read as float32, may be coordinates: finite, and below 10 km."""
    head = np.frombuffer(bytes(body[: min(len(body), 4096) // 4 * 4]), dtype="<f4")
    with np.errstate(invalid="ignore"):
        return bool(len(head) and (np.isfinite(head) & (np.abs(head) < 1e4)).mean() > 0.99)


# Reject a layout only if another one explains the numbers far better than happens by chance.
_SAMPLE_FLOATS = 1 << 11
_MIN_FLOATS = 512
_STRIDES: tuple[int, ...] = (*range(3, 11), 12)  # 12: the longest of PCL's points
_FAR_BETTER = 0.35
# Of all numbers, those that may be coordinates, and those that are of no sensor but integers' bytes.
_MIN_PLAUSIBLE, _MAX_TINY, _TINY = 0.5, 0.1, 1e-20


def check_layout(body: Bytes, width: int) -> None:
    """Reject a ``.bin`` whose numbers cannot be little-endian float32 points of `width` columns.

    Numbers of another type or byte order are hardly ever of the size of coordinates. Of the right stride, numbers one
    stride apart are of the same column and mostly of neighbouring points: they differ far less than numbers any
    other distance apart.

    Of columns one after another, numbers of one point have nothing in common with those of another but
    the part of the file that they are in.

    Raises:
        UndecodableFrame: the message names the likely layout, and how to declare another.
    """
    sample = bytes(body[: 4 * _SAMPLE_FLOATS])
    sample = sample[: len(sample) // 8 * 8]
    if len(sample) < 4 * _MIN_FLOATS:
        return
    numbers = np.frombuffer(sample, "<f4")
    plausible = _plausible_share(numbers)
    for kind, name in ((">f4", "big-endian float32"), ("<f8", "float64"), (">f8", "big-endian float64")):
        if plausible < 0.9 and _plausible_share(np.frombuffer(sample, kind)) > 0.98:
            raise UndecodableFrame(
                f"the body looks like {name}, not float32 little-endian; convert it, or send .npy, "
                "which declares its type"
            )
    tiny = float(((numbers != 0) & (np.abs(numbers) < _TINY)).mean())
    if plausible < _MIN_PLAUSIBLE or tiny > _MAX_TINY:
        raise UndecodableFrame(
            f"the body does not look like float32 points: {1 - plausible:.0%} of its numbers are neither 0 nor of the "
            "size of a coordinate or intensity, as are integers, float16, packed colours or compressed bytes; "
            f"convert it, send .npy, which declares its type, or declare load_dim={width} if that is what they are"
        )
    if _is_by_column(np.frombuffer(body, "<f4"), width):
        raise UndecodableFrame(
            f"the body looks like {width} columns one after another (all x, then all y, …), not like points of "
            f"{width} numbers; write the transposed array, or declare load_dim={width} if that is what they are"
        )
    best = _likely_stride(numbers, width)
    if best is not None and (len(body) // 4) % best == 0:
        raise UndecodableFrame(
            f"the body looks like points of {best} numbers, this model takes {width}; name the columns, as in "
            f"columns=x,y,z,…, or declare load_dim={width} if that is what they are"
        )


_SAMPLE_PER_PART = 256
#: Share of the variance between groups: noise of a sample of that size is below the first.
_NOTHING, _MUCH = 0.02, 0.2
# Difference of means at the border of two columns, in standard deviations.
_JUMP = 0.45


def _is_by_column(numbers: npt.NDArray[np.float32], width: int) -> bool:
    """Whether a cloud is stored column by column.

    Each of `width` parts of the file is then of another quantity: sizes differ between parts, at once where one part
    ends, and do not differ between the places of a point.
    """
    head = _sizes(numbers[: _SAMPLE_FLOATS // width * width])
    if max(_between(values, np.arange(len(values)) % width, width) for values in head) >= _NOTHING:
        return False  # of most clouds: their first points show it
    count = len(numbers) // width
    rng = np.random.default_rng(0)  # evenly spaced places could keep step with the points
    parts = np.repeat(np.arange(width), _SAMPLE_PER_PART)
    sample = parts * count + rng.integers(0, count, len(parts))
    near = min(count, max(64, count // 64))  # a border is sharp
    before = count * np.arange(1, width)[:, None] - 1 - rng.integers(0, near, _SAMPLE_PER_PART)
    after = before + near
    differs = jumps = False
    for values, left, right in zip(
        *map(_sizes, (numbers[sample], numbers[before], numbers[after])), strict=True
    ):
        if _between(values, sample % width, width) >= _NOTHING:
            return False
        differs |= _between(values, parts, width) > _MUCH
        jumps |= float(np.abs(left.mean(1) - right.mean(1)).max()) > _JUMP * float(values.std())
    return differs and jumps


def _sizes(numbers: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.float32], ...]:
    """Two quantities in which columns differ: the value, and its order of magnitude."""
    values = np.clip(np.nan_to_num(numbers), -1e3, 1e3)
    return values, np.log2(np.abs(values) + 1e-3)


def _between(values: npt.NDArray[np.float32], groups: npt.NDArray[np.int64], count: int) -> float:
    """Share of the variance that lies between groups (eta squared), 0 to 1."""
    spread = float(values.var())
    if not spread:
        return 0.0
    members = np.bincount(groups, minlength=count)
    means = np.bincount(groups, values, count) / np.maximum(members, 1)
    return float((members * (means - values.mean()) ** 2).sum() / (len(values) * spread))


def _plausible_share(numbers: npt.NDArray[np.floating]) -> float:
    """Return the share of numbers that may be coordinates, intensities, colours or zero."""
    with np.errstate(invalid="ignore"):
        size = np.abs(numbers)
        return float(((size == 0) | ((size > 1e-6) & (size < 1e5))).mean())


def _likely_stride(numbers: npt.NDArray[np.float32], width: int) -> int | None:
    """Return a stride that explains the numbers far better than `width`, or None."""
    with np.errstate(invalid="ignore", over="ignore"):
        clipped = np.clip(np.nan_to_num(numbers), -1e3, 1e3)
    change = {
        stride: float(np.median(np.abs(clipped[stride:] - clipped[:-stride])))
        for stride in {*_STRIDES, width}
    }
    best = min(_STRIDES, key=lambda stride: change[stride])
    if best != width and change[best] < _FAR_BETTER * change[width]:
        return best
    # Numbers two or more strides apart are of the same column too, so that a multiple explains them as well.
    for part in (stride for stride in _STRIDES if width % stride == 0 and stride < width):
        others = [change[stride] for stride in _STRIDES if stride % part]
        if change[part] < min(change[width], _FAR_BETTER * min(others)):
            return part
    return None


def arrange(
    table: PointTable, layout: PointLayout, constants: Mapping[str, float]
) -> npt.NDArray[np.float32]:
    """Arrange columns in the order of the model.

    Args:
        table: columns of the file.
        layout: columns of the model; unused ones may be missing and become 0.
        constants: values given by the client for missing columns.

    Returns:
        (N, len(layout.columns)) float32.

    Raises:
        UndecodableFrame: a column that the model uses is missing.
    """
    missing = [
        name
        for k, name in enumerate(layout.columns)
        if k in layout.used and name not in table.columns and name not in constants
    ]
    if missing:
        raise UndecodableFrame(
            f"the {table.format} file has no column {', '.join(missing)}, which the model uses; it has "
            f"{', '.join(table.columns) or 'none'}; give a value, as in columns={missing[0]}=0, or send the column"
        )
    points = np.zeros((table.count, len(layout.columns)), dtype=np.float32)
    with np.errstate(over="ignore"):  # a double out of range becomes inf, which is rejected later
        for k, name in enumerate(layout.columns):
            if name in table.columns:
                points[:, k] = table.columns[name]
            else:
                points[:, k] = constants.get(name, 0.0)
    return points

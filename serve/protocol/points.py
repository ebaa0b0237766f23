"""Bytes to a point cloud in a model's columns.

The first bytes show the format (`serve.protocol.point_signatures`). A ``.bin`` has no header, so that the plausibility
of its numbers is checked (`serve.protocol.bin_layout`), unless the client declares the layout (``load_dim``,
``columns``).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from serve.errors import FrameTooLarge, NonFinitePoints, UndecodableFrame
from serve.protocol.batch import Bytes
from serve.protocol.bin_layout import check_layout
from serve.protocol.point_columns import PointLayout, arrange, name_columns, parse_columns
from serve.protocol.point_formats import read_point_file
from serve.protocol.point_signatures import sniff
from serve.protocol.point_table import PointTable
from serve.settings import Limits

__all__ = ["decode_points"]

# A LiDAR sees some hundred metres; larger coordinates are misread bytes.
MAX_COORDINATE_M = 1e6
_PRINTABLE = frozenset(b"\t\n\r" + bytes(range(32, 127)))


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
        table = name_columns(
            PointTable("bin", {str(k): read[:, k] for k in range(width)}, len(read)), declared, layout
        )
        points = read if declared is None else arrange(table, layout, declared.constants)
    else:
        table = name_columns(read_point_file(body, kind, limits), declared, layout)
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
            f"the point cloud has {len(body) // stride} points, the limit is {limits.max_points}; send fewer, or raise "
            "MMDET3D_SERVE_MAX_POINTS"
        )
    return np.frombuffer(body, dtype="<f4").astype(np.float32, copy=False).reshape(-1, width)

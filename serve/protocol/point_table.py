"""Columns of a point-cloud file under their standard names, and the bounds that every reader checks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from serve.errors import FrameTooLarge, UndecodableFrame
from serve.settings import Limits

__all__ = [
    "MAX_BYTES_PER_POINT",
    "MAX_COLUMNS",
    "STANDARD_NAME",
    "PointTable",
    "check_bytes",
    "check_count",
    "check_unpacked",
    "standard_table",
]

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
_SPELLING_RANK = {spelling: rank for spellings in ALIASES.values() for rank, spelling in enumerate(spellings)}
MAX_COLUMNS = 128
MAX_BYTES_PER_POINT = 1024


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


def standard_table(name: str, columns: Mapping[str, npt.NDArray[Any]], count: int) -> PointTable:
    """Rename columns to their standard names; reject non-numeric columns and missing coordinates."""
    numeric = {
        own: values
        for own, values in columns.items()
        if values.dtype.kind in "fiu"
        and values.shape == (count,)  # else a list, a text: nothing a model takes
    }
    standard: dict[str, npt.NDArray[Any]] = {}
    # Sensors give both intensity and reflectivity: a column's own name goes before another spelling of it.
    for own in sorted(numeric, key=lambda own: _SPELLING_RANK.get(own.lower(), 0)):
        standard.setdefault(STANDARD_NAME.get(own.lower(), own), numeric[own])
    lacking = [axis for axis in "xyz" if axis not in standard]
    if lacking:
        raise UndecodableFrame(
            f"the {name} file has no coordinate {', '.join(lacking)}; its columns are {', '.join(columns) or 'none'}"
        )
    return PointTable(name, standard, count)


def check_count(count: int, limits: Limits) -> None:
    """Compare a number of points with the limits.

    Raises:
        UndecodableFrame: it is negative.
        FrameTooLarge: it is over the limit.
    """
    if count < 0:
        raise UndecodableFrame(f"the header claims {count} points")
    if count > limits.max_points:
        raise FrameTooLarge(
            f"the point cloud has {count} points, the limit is {limits.max_points}; send fewer, or raise "
            "MMDET3D_SERVE_MAX_POINTS"
        )


def check_unpacked(name: str, count: int, bytes_per_point: int, limits: Limits) -> None:
    """Bound what a compressed file may become by what an uncompressed one may have."""
    if count * bytes_per_point > limits.max_frame_bytes:
        raise FrameTooLarge(
            f"the {name} has {count * bytes_per_point} bytes unpacked, the limit is {limits.max_frame_bytes}; "
            "send fewer points, or raise MMDET3D_SERVE_MAX_FRAME_BYTES"
        )


def check_bytes(name: str, count: int, bytes_per_point: int, have: int) -> None:
    """Compare what a header claims with the bytes that follow it.

    Raises:
        UndecodableFrame: it claims more than there is, or an impossible size of a point.
    """
    if bytes_per_point > MAX_BYTES_PER_POINT:
        raise UndecodableFrame(f"the {name} header claims {bytes_per_point} bytes per point")
    if count * bytes_per_point > have:
        raise UndecodableFrame(
            f"the {name} header claims {count} points of {bytes_per_point} bytes, but {have} bytes follow"
        )

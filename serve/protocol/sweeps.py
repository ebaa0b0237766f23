"""Sweeps of a frame: earlier point clouds with their times and poses, and clouds that a client accumulated.

A frame of a model with a multi-sweep step has the part ``points`` (the key frame), and optionally ``sweep.0``,
``sweep.1``, … with the part ``sweeps``, a JSON list of one object per sweep: its time (``time_lag_s``, or
``timestamp_s`` together with that of the key frame) and its pose (``transform`` or ``lidar2sensor``). The option
``sweeps=accumulated`` declares that ``points`` holds several sweeps already.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from serve.errors import BadRequest, FrameTooLarge, NonFinitePoints, UndecodableFrame, UnknownOption, quote
from serve.protocol.batch import Bytes
from serve.protocol.json_reader import JsonBounds, read_json
from serve.protocol.point_columns import PointLayout
from serve.protocol.points import decode_points
from serve.settings import Limits

__all__ = [
    "ACCUMULATED",
    "MAX_SWEEPS",
    "Sweep",
    "SweepPose",
    "SweepSpec",
    "check_sweeps_option",
    "decode_sweeps",
    "describe_lags",
    "is_sweep_part",
    "list_sweeps",
    "nearest",
    "parse_sweeps",
]

ACCUMULATED = "accumulated"
MAX_SWEEPS = 64
_BOUNDS = JsonBounds(max_values=100 * MAX_SWEEPS, max_bytes=1 << 20, max_depth=6)
# Microseconds, nanoseconds and absolute times exceed it; a sweep is at most seconds old.
MAX_LAG_S = 3600.0
MAX_SHIFT_M = 10_000.0
# Data sets have sweeps of one second at most: longer ago is likely in milliseconds, or the time of day.
USUAL_LAG_S = 10.0
# Largest deviation of R R^T from the identity: matrices are often printed with few digits.
ROTATION_TOLERANCE = 1e-2
# mmdet3d writes the time into this column of a sweep.
_SWEEP_TIME_COLUMN = 4
_TIMES = ("time_lag_s", "timestamp_s")
_POSES = ("transform", "lidar2sensor")
Matrix = npt.NDArray[np.float64]


@dataclass(frozen=True)
class SweepSpec:
    """Sweeps that a model takes.

    Attributes:
        number: number of sweeps that the model uses in addition to the key frame.
        load_dim: float32 numbers per point of a sweep's ``.bin``.
        time_column: index of the key frame's column for the time before it, seconds.
        repeats: whether the key frame is repeated in place of missing sweeps.
    """

    number: int
    load_dim: int = 5
    time_column: int = 4
    repeats: bool = False

    @property
    def warning(self) -> str:
        """Say what happens to a key frame without sweeps."""
        filled = f", and is repeated {self.number} times as in training" if self.repeats else ""
        return (
            f"the model was trained on {self.number} earlier sweeps with their times; a frame without any is used "
            f"alone with time 0{filled}; send sweep.0, sweep.1, … and sweeps, or sweeps={ACCUMULATED} for a cloud of "
            "several sweeps"
        )

    @property
    def layout(self) -> PointLayout:
        """Columns of a sweep's points; the time is computed, so that a file may lack it."""
        names = PointLayout.default(self.load_dim, is_depth=False).columns
        used = frozenset(range(self.load_dim)) - {_SWEEP_TIME_COLUMN}
        return PointLayout(names, used)

    def accumulated(self, layout: PointLayout) -> PointLayout:
        """Columns of a cloud of several sweeps: those of the key frame, with the time in its column."""
        names = [f"column_{k}" if name == "time" else name for k, name in enumerate(layout.columns)]
        names[self.time_column] = "time"
        return PointLayout(tuple(names), layout.used | {self.time_column})


@dataclass(frozen=True)
class SweepPose:
    """Time and pose of a sweep.

    Attributes:
        time_lag_s: seconds before the key frame.
        lidar2sensor: (4, 4), as mmdet3d's ``LoadPointsFromMultiSweeps`` applies it: points @ R - t.
    """

    time_lag_s: float
    lidar2sensor: Matrix


@dataclass(frozen=True)
class Sweep(SweepPose):
    """A decoded sweep.

    Attributes:
        points: (N, load_dim) float32 in the sweep's own LiDAR frame.
    """

    points: npt.NDArray[np.float32]


def is_sweep_part(name: str, value: Any = None) -> bool:
    """Return whether a form field or JSON member is a part of a frame with sweeps.

    The name ``sweeps`` is a part if its value is JSON or of unknown content, and an option if it is a word.
    """
    if name != "sweeps":
        return name.startswith("sweep.")
    if isinstance(value, bytes | bytearray | memoryview):
        value = bytes(value[:64]).decode("latin-1")
    return not isinstance(value, str) or value.lstrip()[:1] in ("[", "{")


def check_sweeps_option(value: Any) -> str:
    """Return the value of the option ``sweeps``.

    Raises:
        UnknownOption: another value than ``accumulated``.
    """
    if isinstance(value, list):
        raise UnknownOption('a list of sweeps goes with points: {"points": {"b64": …}, "sweeps": […]}')
    if value != ACCUMULATED:
        raise UnknownOption(f"sweeps must be {ACCUMULATED}, got {quote(value)}")
    return ACCUMULATED


def list_sweeps(document: Mapping[str, Any]) -> dict[str, Any]:
    """Move the clouds that a JSON frame lists under ``sweeps`` to members ``sweep.0``, ``sweep.1``, ….

    A member ``timestamp_s`` of the frame, the time of the key frame, moves into ``sweeps``.

    Raises:
        BadRequest: more than `MAX_SWEEPS` sweeps, or a cloud is given twice.
    """
    found = dict(document)
    listed = found.get("sweeps")
    if not isinstance(listed, list):
        return found
    if len(listed) > MAX_SWEEPS:
        raise BadRequest(f"sweeps has {len(listed)} entries, the limit is {MAX_SWEEPS}")
    poses = []
    for k, sweep in enumerate(listed):
        if isinstance(sweep, Mapping) and "points" in sweep:
            if f"sweep.{k}" in found:
                raise BadRequest(f"sweep.{k} is given twice: as a member, and in sweeps")
            found[f"sweep.{k}"] = sweep["points"]
            sweep = {name: value for name, value in sweep.items() if name != "points"}
        poses.append(sweep)
    whole: dict[str, Any] = {"sweeps": poses}
    if "timestamp_s" in found:
        whole["timestamp_s"] = found.pop("timestamp_s")
    found["sweeps"] = whole
    return found


def parse_sweeps(body: Bytes) -> list[SweepPose]:
    """Parse the part ``sweeps``: a JSON list, or ``{"timestamp_s": …, "sweeps": […]}``.

    Raises:
        UndecodableFrame: it is not JSON of this form, or a time or pose is implausible.
        FrameTooLarge: far more text or values than `MAX_SWEEPS` poses have.
    """
    try:
        document = read_json(body, _BOUNDS)
    except BadRequest as error:
        raise UndecodableFrame(f"sweeps cannot be read: {error}") from None
    key_time: float | None = None
    if isinstance(document, dict):
        if unknown := set(document) - {"sweeps", "timestamp_s"}:
            raise UndecodableFrame(f"sweeps has the unknown member {min(unknown)[:80]!r}")
        if "timestamp_s" in document:
            key_time = _number("timestamp_s of the key frame", document["timestamp_s"])
        document = document.get("sweeps")
    if not isinstance(document, list) or len(document) > MAX_SWEEPS:
        raise UndecodableFrame(
            f"sweeps must be a list of at most {MAX_SWEEPS} objects with time_lag_s and transform, one per sweep"
        )
    return [_parse_pose(f"sweeps[{k}]", each, key_time) for k, each in enumerate(document)]


def _parse_pose(place: str, sweep: Any, key_time: float | None) -> SweepPose:
    if not isinstance(sweep, dict):
        raise UndecodableFrame(f"{place} must be an object with time_lag_s and transform")
    if unknown := set(sweep) - {*_TIMES, *_POSES}:
        raise UndecodableFrame(
            f"{place} has the unknown member {min(unknown)[:80]!r}; known: {', '.join((*_TIMES, *_POSES))}"
        )
    times, poses = [name for name in _TIMES if name in sweep], [name for name in _POSES if name in sweep]
    if len(times) != 1 or len(poses) != 1:
        raise UndecodableFrame(
            f"{place} must have one of {' and '.join(_TIMES)}, and one of {' and '.join(_POSES)}"
        )
    lag = _number(f"{place}.{times[0]}", sweep[times[0]])
    if times[0] == "timestamp_s":
        if key_time is None:
            raise UndecodableFrame(
                f"{place} has timestamp_s, but the key frame has none; add it, or send time_lag_s"
            )
        lag = key_time - lag
    if not 0 <= lag <= MAX_LAG_S:
        raise UndecodableFrame(
            f"{place} is {lag:g} s before the key frame; expected 0 to {MAX_LAG_S:g}, in seconds"
        )
    matrix = _pose_matrix(f"{place}.{poses[0]}", sweep[poses[0]])
    if poses[0] == "transform":
        applied = np.eye(4)
        applied[:3, :3], applied[:3, 3] = matrix[:3, :3].T, -matrix[:3, 3]
        matrix = applied
    return SweepPose(lag, matrix)


def _number(place: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UndecodableFrame(f"{place} must be a finite number, got {quote(value)}")
    return float(value)


def _pose_matrix(place: str, rows: Any) -> Matrix:
    if (
        not isinstance(rows, list)
        or len(rows) != 4
        or not all(isinstance(row, list) and len(row) == 4 for row in rows)
    ):
        raise UndecodableFrame(f"{place} must be a 4 x 4 matrix, as a list of rows")
    matrix = np.array([[_number(place, value) for value in row] for row in rows], dtype=np.float64)
    rotation, shift = matrix[:3, :3], matrix[:3, 3]
    if np.abs(matrix[3] - (0, 0, 0, 1)).max() > 1e-6:
        raise UndecodableFrame(f"the last row of {place} must be 0, 0, 0, 1; is the matrix transposed?")
    with np.errstate(over="ignore", invalid="ignore"):
        deviation = np.abs(rotation @ rotation.T - np.eye(3)).max()
        turned = np.linalg.det(rotation) > 0
    if not (deviation <= ROTATION_TOLERANCE and turned):
        raise UndecodableFrame(
            f"the upper left 3 x 3 of {place} is not a rotation (R R^T = I, determinant 1)"
        )
    if np.abs(shift).max() > MAX_SHIFT_M:
        raise UndecodableFrame(
            f"{place} shifts by {np.abs(shift).max():.3g} m; it must be relative to the key frame's LiDAR, in metres"
        )
    return matrix


def describe_lags(lags: npt.NDArray[Any]) -> str | None:
    """Say what is unusual about times before the key frame (N,), seconds; None if nothing is."""
    if not len(lags) or (lags.min() >= 0 and lags.max() <= USUAL_LAG_S):
        return None
    return (
        f"times are {lags.min():g} to {lags.max():g} s before the key frame; models are trained on a second at most, "
        "and none later: are they in milliseconds, or of a clock?"
    )


def nearest(poses: Sequence[SweepPose], number: int) -> list[int]:
    """Return the indices of the `number` latest sweeps, in the order given; of equal times the first."""
    return sorted(sorted(range(len(poses)), key=lambda k: poses[k].time_lag_s)[:number])


def decode_sweeps(
    parts: Mapping[str, Bytes],
    spec: SweepSpec,
    limits: Limits,
    *,
    num_key_points: int,
    columns: str | None = None,
    load_dim: int | None = None,
) -> tuple[Sweep, ...]:
    """Decode the sweeps that the model uses: the latest `spec.number`.

    Args:
        parts: ``sweeps`` and ``sweep.0``, ``sweep.1``, …; other parts are ignored.
        spec: sweeps that the model takes.
        limits: limits; `max_points` on the key frame and the sweeps together.
        num_key_points: number of points of the key frame.
        columns: columns of the files as declared by the client.
        load_dim: numbers per point as declared by the client.

    Raises:
        BadRequest: clouds and entries of ``sweeps`` do not correspond.
        FrameTooLarge: too many points.
        UndecodableFrame: a cloud, a time or a pose cannot be read.
        NonFinitePoints: a cloud contains NaN or inf.
    """
    clouds = [name for name in parts if name.startswith("sweep.")]
    if "sweeps" not in parts:
        raise BadRequest(
            f"{clouds[0][:80]} needs the part sweeps: a JSON list with time_lag_s and transform of each"
        )
    poses = parse_sweeps(parts["sweeps"])
    expected = {f"sweep.{k}" for k in range(len(poses))}
    if set(clouds) != expected:
        wrong = sorted(expected.symmetric_difference(clouds))[0]
        raise BadRequest(
            f"sweeps describes {len(poses)} sweeps, the frame has {len(clouds)} clouds sweep.0, sweep.1, …; "
            f"{wrong[:80]} is in one of them only"
        )
    left = limits.max_points - num_key_points
    found = []
    for k in nearest(poses, spec.number):
        try:
            points = decode_points(
                parts[f"sweep.{k}"],
                spec.layout,
                replace(limits, max_points=max(0, left)),
                columns=columns,
                load_dim=load_dim,
            )
        except FrameTooLarge:
            raise FrameTooLarge(
                f"key frame and sweeps have more than {limits.max_points} points together "
                "(MMDET3D_SERVE_MAX_POINTS)"
            ) from None
        except (UndecodableFrame, NonFinitePoints) as error:
            raise type(error)(f"sweep.{k}: {error}") from None
        left -= len(points)
        found.append(Sweep(poses[k].time_lag_s, poses[k].lidar2sensor, points))
    return tuple(found)

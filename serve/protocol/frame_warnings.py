"""Warnings about frames: likely mistakes of a client that are answered all the same.

A warning says what is unusual and what to do. Statistics are taken from at most `_SAMPLE` points, evenly spaced, so
that they take a fraction of a millisecond.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["FrameWarning", "PointExpectations", "check_points", "intensity_scale", "share_in_range"]

_SAMPLE = 4096
_SMALL_SAMPLE = 1024
_MIN_SHARE_IN_RANGE = 0.1
_INTENSITY = 3
# Largest intensity of a scale, and how far a few of its values may exceed it.
_SLACK = 1.5
_MIN_SHARE_ABOVE = 0.01
_SCALES = (1.0, 255.0, 65535.0)


@dataclass(frozen=True)
class FrameWarning:
    """A likely mistake.

    Attributes:
        code: a word for programs.
        message: what is unusual, and what to do.
    """

    code: str
    message: str

    def document(self) -> dict[str, str]:
        """Return the JSON object of an answer."""
        return {"code": self.code, "message": self.message}


@dataclass(frozen=True)
class PointExpectations:
    """What a model expects of a point cloud.

    Attributes:
        point_cloud_range: x, y, z minimum and maximum, metres; None if the model takes points anywhere.
        intensity_max: largest intensity of the data set; None if unknown.
        uses_intensity: whether the model reads column 3 as intensity.
    """

    point_cloud_range: tuple[float, ...] | None = None
    intensity_max: float | None = None
    uses_intensity: bool = False


def intensity_scale(points: npt.NDArray[np.float32]) -> float | None:
    """Return the usual scale (1, 255 or 65535) of a cloud's intensities; None without any, or beyond."""
    if not len(points) or points.shape[1] <= _INTENSITY:
        return None
    top = float(points[:, _INTENSITY].max())
    return next((scale for scale in _SCALES if 0 < top <= scale), None)


def check_points(points: npt.NDArray[np.float32], expected: PointExpectations) -> tuple[FrameWarning, ...]:
    """Check a point cloud (N, >=3) against what the model expects."""
    if not len(points):
        return (
            FrameWarning("empty_cloud", "the point cloud has no points, so that nothing can be detected"),
        )
    sample = _sample(points, _SAMPLE)
    found = [_check_range(sample, expected.point_cloud_range)]
    if expected.uses_intensity and points.shape[1] > _INTENSITY:
        found.append(_check_intensity(points[:, _INTENSITY], sample[:, _INTENSITY], expected.intensity_max))
    return tuple(warning for warning in found if warning is not None)


def share_in_range(points: npt.NDArray[np.float32], bounds: tuple[float, ...]) -> float | None:
    """Return the share of points (N, >=3) within a range, of at most `_SMALL_SAMPLE` of them; None without points.

    Args:
        points: x, y, z first, metres.
        bounds: x, y, z minimum and maximum, metres.
    """
    return _share_of_sample(_sample(points, _SMALL_SAMPLE), bounds) if len(points) else None


def _sample(points: npt.NDArray[np.float32], number: int) -> npt.NDArray[np.float32]:
    return points[:: max(1, -(-len(points) // number))]


def _share_of_sample(sample: npt.NDArray[np.float32], bounds: tuple[float, ...]) -> float:
    low, high = np.asarray(bounds, dtype=np.float32).reshape(2, 3)
    return float(((sample[:, :3] >= low) & (sample[:, :3] < high)).all(axis=1).mean())


def _check_range(sample: npt.NDArray[np.float32], bounds: tuple[float, ...] | None) -> FrameWarning | None:
    if bounds is None:
        return None
    share = _share_of_sample(sample, bounds)
    if share >= _MIN_SHARE_IN_RANGE:
        return None
    shown = ", ".join(f"{bound:g}" for bound in bounds)
    return FrameWarning(
        "points_out_of_range",
        f"{share:.1%} of the points are within the model's range ({shown}; x, y, z minimum, then maximum, in metres); "
        "check units and axes",
    )


def _check_intensity(
    intensity: npt.NDArray[np.float32], sample: npt.NDArray[np.float32], largest: float | None
) -> FrameWarning | None:
    top = float(sample.max())
    if top == 0 and not intensity.any():
        return FrameWarning(
            "no_intensity", "all intensities are zero, but the model uses them; send those of the sensor"
        )
    if largest is None:
        return None
    if float((sample > _SLACK * largest).mean()) > _MIN_SHARE_ABOVE:
        return FrameWarning(
            "intensity_scale",
            f"intensities reach {top:g}, the model was trained on 0 to {largest:g}; scale them to that range",
        )
    if largest > 1 and 0 < top <= 1 and len(sample) >= 100:
        return FrameWarning(
            "intensity_scale",
            f"intensities reach {top:g} only, the model was trained on 0 to {largest:g}; multiply them by {largest:g}",
        )
    return None

"""The statistics that are watched: their bins, and counts in these.

A bin is named by its upper bound, which belongs to it, as in Prometheus; the last one has none. Lengths and numbers of
points are in the series E12 and E6 of preferred numbers (IEC 60063), so that a factor of 1.2 or 1.5 is one bin.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "CLASS",
    "LOWEST_SCORE",
    "MAX_CLASSES",
    "OTHER",
    "SCORE_THR",
    "SEGMENT",
    "STATISTICS",
    "Counts",
    "Layout",
    "Statistic",
]

#: Detections below it are in no statistic: many heads return hundreds of them for every frame.
LOWEST_SCORE = 0.1
#: From it on a detection counts, unless a reference says otherwise; also `compare`'s threshold.
SCORE_THR = 0.3
#: Classes with a count of their own; the others share `OTHER`.
MAX_CLASSES = 32
OTHER = "(other)"
#: Name of the statistic of classes, whose bins are names.
CLASS = "class"
#: Name of the statistic of the points or pixels of segmentations by class, with the same bins.
SEGMENT = "segment"

_MAX_WARNING_CODES = 32
_WARNING_CODE = re.compile(r"[a-z][a-z0-9_]{0,63}")


def _decades(first: int, last: int, steps: Sequence[float]) -> tuple[float, ...]:
    """Return the steps of every decade from 10**first to 10**last."""
    found = [float(f"{step}e{k}") for k in range(first, last) for step in steps]
    return (*found, float(f"1e{last}"))


_E6 = (1.0, 1.5, 2.2, 3.3, 4.7, 6.8)
_LENGTHS_M = (
    *(0.33, 0.39, 0.47, 0.56, 0.68, 0.82, 1.0, 1.2, 1.5, 1.8, 2.2, 2.7),
    *(3.3, 3.9, 4.7, 5.6, 6.8, 8.2, 10.0, 12.0, 15.0, 18.0, 22.0),
)


@dataclass(frozen=True)
class Statistic:
    """One number of a frame or a detection.

    Attributes:
        name: in references, and the label ``statistic`` of the drift metrics.
        metric: name of its Prometheus histogram.
        text: what it is, with its unit.
        edges: upper bounds of its bins, rising; one more bin has no bound.
    """

    name: str
    metric: str
    text: str
    edges: tuple[float, ...]

    @cached_property
    def bounds(self) -> npt.NDArray[np.float64]:
        """The edges as an array."""
        return np.array(self.edges)


STATISTICS: Mapping[str, Statistic] = {
    each.name: each
    for each in (
        Statistic(
            "detections",
            "mmdet3d_serve_frame_detections",
            "Detections of a frame that reach the score threshold",
            (0, 1, 2, 3, 4, 5, 6, 8, 10, 13, 17, 22, 30, 40, 55, 75, 100, 150, 200, 300),
        ),
        Statistic(
            "points", "mmdet3d_serve_frame_points", "Points of a frame's cloud", (0, *_decades(2, 6, _E6))
        ),
        Statistic(
            "points_in_range",
            "mmdet3d_serve_frame_points_in_range_ratio",
            "Share of a frame's points within the model's range",
            (0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99, 1),
        ),
        Statistic(
            "score",
            "mmdet3d_serve_detection_score",
            f"Scores of detections from {LOWEST_SCORE:g} on",
            tuple(round(0.15 + 0.05 * k, 2) for k in range(18)),
        ),
        Statistic(
            "distance",
            "mmdet3d_serve_detection_distance_meters",
            "Distance of a 3D box from the sensor, on the ground",
            (5, 10, 15, 20, 25, 30, 35, 40, 45, 50, 60, 70, 80, 100, 120, 150, 200),
        ),
        Statistic(
            "elevation",
            "mmdet3d_serve_detection_elevation_meters",
            "Height of a 3D box's bottom above the sensor",
            (-10, -5, -4, *(round(-3 + 0.25 * k, 2) for k in range(17)), 1.5, 2, 3, 5, 10),
        ),
        *(
            Statistic(
                name,
                f"mmdet3d_serve_detection_{name}_meters",
                f"{name.capitalize()} of a 3D box",
                _LENGTHS_M,
            )
            for name in ("length", "width", "height")
        ),
        Statistic(
            "area",
            "mmdet3d_serve_detection_area_pixels",
            "Area of a 2D box",
            tuple(float(2**k) for k in range(5, 24)),
        ),
    )
}


@dataclass(frozen=True)
class Layout:
    """Places of all bins in one array.

    Attributes:
        classes: names of the classes with a count of their own, at most `MAX_CLASSES`.
    """

    classes: tuple[str, ...]

    @classmethod
    def of_classes(cls, classes: Sequence[str], counts: Mapping[str, int] | None = None) -> Layout:
        """Choose the classes to count: all, or the most frequent in `counts`, or else the first."""
        names = [name for name in dict.fromkeys(classes) if name != OTHER]
        if len(names) > MAX_CLASSES:
            order = {name: k for k, name in enumerate(names)}
            names.sort(key=lambda name: (-(counts or {}).get(name, 0), order[name]))
            names = sorted(names[:MAX_CLASSES], key=order.__getitem__)
        return cls(tuple(names))

    @cached_property
    def slices(self) -> Mapping[str, slice]:
        """Place of each statistic, those of classes included."""
        found, at = {}, 0
        for name, bins in (
            *((name, len(each.edges) + 1) for name, each in STATISTICS.items()),
            (CLASS, len(self.classes) + 1),
            (SEGMENT, len(self.classes) + 1),
        ):
            found[name] = slice(at, at + bins)
            at += bins
        return found

    @cached_property
    def size(self) -> int:
        """Number of bins."""
        return max(int(place.stop) for place in self.slices.values())

    @cached_property
    def class_index(self) -> Mapping[str, int]:
        """Bin of each class; others have the last."""
        return {name: k for k, name in enumerate(self.classes)}

    def bin_of(self, name: str) -> int:
        """Return the bin of a class."""
        return self.class_index.get(name, len(self.classes))

    def empty(self) -> Counts:
        """Return counts of nothing."""
        return Counts(self, np.zeros(self.size, np.int64))

    def read(self, document: Mapping[str, Any]) -> Counts:
        """Read what `Counts.document` returned in another process; what this layout does not know is left out.

        Raises:
            ValueError: it is not such a document.
        """
        counts = self.empty()
        try:
            counts.frames = _whole(document["frames"])
            for name, found in document["statistics"].items():
                if name not in STATISTICS:
                    continue
                place = self.slices[name]
                for index, number in found["bins"]:
                    if not 0 <= _whole(index) < place.stop - place.start:
                        raise ValueError(f"{name} has no bin {index}")
                    counts.bins[place.start + index] += _whole(number)
                if not math.isfinite(sum_of_values := float(found["sum"])):
                    raise ValueError(f"the sum of {name} is {sum_of_values}")
                counts.sums[name] += sum_of_values
            for statistic, found in ((CLASS, document["classes"]), (SEGMENT, document.get("segments", {}))):
                for name, number in found.items():
                    counts.of(statistic)[self.bin_of(name)] += _whole(number)
            counts.add_warnings({str(code): _whole(number) for code, number in document["warnings"].items()})
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"malformed observation: {error!r}"[:200]) from None
        return counts


def _whole(number: Any) -> int:
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < 1 << 48:
        raise ValueError(f"{str(number)[:40]!r} is no count")
    return number


@dataclass
class Counts:
    """Counts of some frames.

    Attributes:
        layout: the place of each bin.
        bins: number of values in each bin, int64.
        frames: number of frames.
        sums: sum of the values of each statistic.
        warnings: frames by code of warning.
    """

    layout: Layout
    bins: npt.NDArray[np.int64]
    frames: int = 0
    sums: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    warnings: Counter[str] = field(default_factory=Counter)

    def of(self, name: str) -> npt.NDArray[np.int64]:
        """Return the counts of one statistic, a view."""
        return self.bins[self.layout.slices[name]]

    def by_class(self, name: str) -> dict[str, int]:
        """Return the counts of `CLASS` or `SEGMENT` by class, those that are not 0."""
        names = (*self.layout.classes, OTHER)
        return {each: n for each, n in zip(names, self.of(name).tolist(), strict=True) if n}

    def add(self, other: Counts) -> None:
        """Add counts of the same layout."""
        self.bins += other.bins
        self.frames += other.frames
        for name, value in other.sums.items():
            self.sums[name] += value
        self.add_warnings(other.warnings)

    def add_values(self, name: str, values: npt.NDArray[np.floating[Any]]) -> None:
        """Count values of a statistic, those that are finite."""
        values = values[np.isfinite(values)]
        if len(values):
            statistic = STATISTICS[name]
            places = np.searchsorted(statistic.bounds, values, side="left")
            self.of(name)[:] += np.bincount(places, minlength=len(statistic.edges) + 1)
            self.sums[name] += float(values.sum())

    def add_warnings(self, codes: Mapping[str, int]) -> None:
        """Count frames by code of warning; there are few codes, so that a stranger's become `OTHER`."""
        for code, number in codes.items():
            known = code in self.warnings or len(self.warnings) < _MAX_WARNING_CODES
            self.warnings[code if known and _WARNING_CODE.fullmatch(code) else OTHER] += number

    def document(self) -> dict[str, Any]:
        """Return what a worker sends: bins that are not empty, by statistic."""
        statistics = {}
        for name in STATISTICS:
            found = self.of(name)
            if len(filled := np.flatnonzero(found)):
                pairs = [[k, n] for k, n in zip(filled.tolist(), found[filled].tolist(), strict=True)]
                statistics[name] = {"bins": pairs, "sum": self.sums[name]}
        return {
            "frames": self.frames,
            "statistics": statistics,
            "classes": self.by_class(CLASS),
            "segments": self.by_class(SEGMENT),
            "warnings": dict(self.warnings),
        }

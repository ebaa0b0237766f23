"""Text of the metrics of what models see, in Prometheus' text format.

The event loop writes it, and every watched version has hundreds of series. Therefore names and labels are joined once
for each version, and its text is made anew only after something was counted.

Source of the format: https://prometheus.io/docs/instrumenting/exposition_formats/.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from serve.watch.statistics import CLASS, OTHER, SEGMENT, STATISTICS, Counts, Layout

__all__ = ["FAMILIES", "DriftFigures", "Family", "VersionText", "exposition"]


@dataclass(frozen=True)
class Family:
    """A metric of all versions.

    Attributes:
        name: its name, as its samples have it.
        kind: its type.
        text: its description.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    text: str

    @property
    def header(self) -> str:
        """The lines before its samples."""
        return f"# HELP {self.name} {self.text}\n# TYPE {self.name} {self.kind}\n"


_FRAMES = Family("mmdet3d_serve_watched_frames_total", "counter", "Frames that were counted")
_CLASSES = Family("mmdet3d_serve_detections_total", "counter", "Detections that reach the score threshold")
_SEGMENTS = Family(
    "mmdet3d_serve_segmented_elements_total", "counter", "Points or pixels of segmentations by their class"
)
_WARNINGS = Family("mmdet3d_serve_frame_warnings_total", "counter", "Frames with a warning")
_DISTANCE = Family(
    "mmdet3d_serve_drift_distance",
    "gauge",
    "Jensen-Shannon distance of the window to the reference, from 0 to 1",
)
_LIMIT = Family("mmdet3d_serve_drift_limit", "gauge", "Distance that chance does not explain any more")
_WINDOW_FRAMES = Family("mmdet3d_serve_drift_window_frames", "gauge", "Frames in the window")
_REFERENCE_FRAMES = Family(
    "mmdet3d_serve_drift_reference_frames",
    "gauge",
    "Frames of the reference, recorded in the archive or learned since the start",
)
_LEARNING = Family("mmdet3d_serve_drift_learning", "gauge", "1 while the reference is still learned, else 0")
_HISTOGRAMS = {each.name: Family(each.metric, "histogram", each.text) for each in STATISTICS.values()}

#: All of them, in the order of the text.
FAMILIES: Sequence[Family] = (
    *_HISTOGRAMS.values(), _FRAMES, _CLASSES, _SEGMENTS, _WARNINGS, _DISTANCE, _LIMIT, _WINDOW_FRAMES,
    _REFERENCE_FRAMES, _LEARNING,
)  # fmt: skip


@dataclass(frozen=True)
class DriftFigures:
    """Gauges of one version.

    Attributes:
        distances: by statistic, the distance to the reference and its limit.
        window_frames: frames in the window.
        reference_frames: frames of the reference, also while it is learned.
        source: ``"archive"`` or ``"learned"``.
        is_learning: whether the reference is still learned.
    """

    distances: Mapping[str, tuple[float, float]]
    window_frames: int
    reference_frames: int
    source: str
    is_learning: bool


class VersionText:
    """Text of one version of a model, by family.

    Args:
        model: name of the model.
        version: its version.
        layout: of its counts.
    """

    def __init__(self, model: str, version: str, layout: Layout) -> None:
        self._labels = f'model="{_escape(model)}",version="{_escape(version)}"'
        self._buckets = {
            statistic.name: [
                f'{statistic.metric}_bucket{{{self._labels},le="{bound}"}}'
                for bound in (*(f"{float(edge):g}" for edge in statistic.edges), "+Inf")
            ]
            for statistic in STATISTICS.values()
        }
        names = (*layout.classes, OTHER)
        self._by_class = {
            family: [self._series(family, "class", name) for name in names]
            for family in (_CLASSES, _SEGMENTS)
        }

    def of_counts(self, counts: Counts) -> dict[Family, str]:
        """Return histograms and counters."""
        found = {}
        for name, family in _HISTOGRAMS.items():
            cumulative: list[int] = counts.of(name).cumsum().tolist()
            if total := cumulative[-1]:
                lines = [
                    f"{series} {number}\n"
                    for series, number in zip(self._buckets[name], cumulative, strict=True)
                ]
                lines.append(f"{self._series(family, suffix='_count')} {total}\n")
                if STATISTICS[name].edges[0] >= 0:  # else it can fall, which a counter must not
                    lines.append(f"{self._series(family, suffix='_sum')} {counts.sums[name]!r}\n")
                found[family] = "".join(lines)
        found[_FRAMES] = f"{self._series(_FRAMES)} {counts.frames}\n"
        found[_CLASSES] = self._of_classes(_CLASSES, counts.of(CLASS).tolist())
        if (segments := counts.of(SEGMENT)).any():
            found[_SEGMENTS] = self._of_classes(_SEGMENTS, segments.tolist())
        found[_WARNINGS] = "".join(
            f"{self._series(_WARNINGS, 'code', code)} {number}\n"
            for code, number in sorted(counts.warnings.items())
        )
        return found

    def _of_classes(self, family: Family, numbers: Sequence[int]) -> str:
        """Return the counts of all classes, and of others if there are any."""
        last = len(numbers) - (not numbers[-1])
        pairs = zip(self._by_class[family][:last], numbers[:last], strict=True)
        return "".join(f"{series} {number}\n" for series, number in pairs)

    def of_drift(self, figures: DriftFigures) -> dict[Family, str]:
        """Return gauges."""
        return {
            **{
                family: "".join(
                    f"{self._series(family, 'statistic', name)} {pair[column]!r}\n"
                    for name, pair in figures.distances.items()
                )
                for column, family in enumerate((_DISTANCE, _LIMIT))
            },
            _WINDOW_FRAMES: f"{self._series(_WINDOW_FRAMES)} {figures.window_frames}\n",
            _REFERENCE_FRAMES: (
                f"{self._series(_REFERENCE_FRAMES, 'source', figures.source)} {figures.reference_frames}\n"
            ),
            _LEARNING: f"{self._series(_LEARNING)} {int(figures.is_learning)}\n",
        }

    def _series(self, family: Family, label: str = "", value: str = "", suffix: str = "") -> str:
        more = f',{label}="{_escape(value)}"' if label else ""
        return f"{family.name}{suffix}{{{self._labels}{more}}}"


def exposition(versions: Sequence[Mapping[Family, str]]) -> str:
    """Join the texts of all versions; a family without a sample has its header."""
    return "".join(_join(versions))


def _join(versions: Sequence[Mapping[Family, str]]) -> Iterator[str]:
    for family in FAMILIES:
        yield family.header
        for texts in versions:
            yield texts.get(family, "")


def _escape(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")

"""The reference of a model: the statistics of frames that it was recorded on, as an entry of its archive."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import orjson
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass

from serve.errors import ArchiveError
from serve.watch.drift import chance_limit
from serve.watch.statistics import CLASS, MAX_CLASSES, OTHER, SCORE_THR, SEGMENT, STATISTICS, Counts, Layout

__all__ = ["ENTRY", "WINDOW_FRAMES", "Recording", "Reference", "reference_of"]

#: Name of the archive's entry; a version before this one has no use for it and serves the archive all the same.
ENTRY = "golden/statistics.json"
#: Least frames of a window that is compared with a reference.
WINDOW_FRAMES = 200

_Count = Annotated[int, Field(ge=0, lt=1 << 48)]
_Share = Annotated[float, Field(ge=0, le=1)]


@checked_dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True))
class _Histogram:
    edges: Annotated[list[float], Field(max_length=256)]
    counts: Annotated[list[_Count], Field(max_length=257)]
    limit: _Share


@checked_dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True))
class _Classes:
    names: Annotated[list[Annotated[str, Field(max_length=1024)]], Field(max_length=MAX_CLASSES)]
    counts: Annotated[list[_Count], Field(max_length=MAX_CLASSES + 1)]
    limit: _Share


@checked_dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True))
class _Segments:
    counts: Annotated[list[_Count], Field(max_length=MAX_CLASSES + 1)]
    limit: _Share


@checked_dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True))
class Recording:
    """How a reference was recorded.

    Attributes:
        time: when, ISO 8601 in UTC.
        source: the frames, as they were named.
        window_frames: least frames of a window that its limits are for.
    """

    time: Annotated[str, Field(max_length=40)]
    source: Annotated[str, Field(max_length=4096)]
    window_frames: Annotated[int, Field(ge=1)]


@checked_dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True))
class _Document:
    format: Literal[1]
    frames: Annotated[int, Field(ge=1)]
    score_thr: _Share
    statistics: Annotated[dict[str, _Histogram], Field(max_length=64)]
    classes: _Classes
    segments: _Segments | None = None
    recording: Recording | None = None


_PARSER: TypeAdapter[_Document] = TypeAdapter(_Document)


@dataclass(frozen=True)
class Reference:
    """Statistics of a model on frames like those that it is to see.

    Attributes:
        counts: of these frames.
        limits: by statistic, the distance above which a window of frames differs; of those with values only.
        score_thr: score from which a detection counts.
        recording: how it was recorded; None of a learned one, and of archives that do not say it.
    """

    KEY: ClassVar[str] = "watch"  # in the description of a model

    counts: Counts
    limits: Mapping[str, float]
    score_thr: float = SCORE_THR
    recording: Recording | None = None

    def document(self) -> dict[str, Any]:
        """Return the JSON object of the archive's entry."""
        layout = self.counts.layout
        return {
            "format": 1,
            "frames": self.counts.frames,
            "score_thr": self.score_thr,
            "statistics": {
                name: {
                    "edges": [float(edge) for edge in STATISTICS[name].edges],
                    "counts": self.counts.of(name).tolist(),
                    "limit": limit,
                }
                for name, limit in self.limits.items()
                if name in STATISTICS
            },
            "classes": {
                "names": list(layout.classes),
                "counts": self.counts.of(CLASS).tolist(),
                "limit": self.limits.get(CLASS, 1.0),
            },
            **(
                {"segments": {"counts": self.counts.of(SEGMENT).tolist(), "limit": self.limits[SEGMENT]}}
                if SEGMENT in self.limits
                else {}
            ),
            **({"recording": asdict(self.recording)} if self.recording is not None else {}),
        }

    @classmethod
    def parse(cls, document: bytes | Mapping[str, Any]) -> Reference:
        """Read a reference; a statistic with other bins, of another version, is left out.

        Raises:
            ArchiveError: it is malformed.
        """
        try:
            text = document if isinstance(document, bytes) else orjson.dumps(document)
            found = _PARSER.validate_json(text)
            if len(found.classes.counts) != len(found.classes.names) + 1:
                raise ValueError("classes and their counts differ in number")
            if len({*found.classes.names, OTHER}) != len(found.classes.counts):
                raise ValueError("a class occurs twice")
            counts = Layout(tuple(found.classes.names)).empty()
            counts.frames = found.frames
            limits: dict[str, float] = {}
            for name, each in found.statistics.items():
                if name in STATISTICS and tuple(each.edges) == tuple(map(float, STATISTICS[name].edges)):
                    if len(each.counts) != len(each.edges) + 1:  # numpy would repeat a single one
                        raise ValueError(f"{name} has {len(each.counts)} counts for {len(each.edges)} edges")
                    counts.of(name)[:] = each.counts
                    limits[name] = each.limit
            counts.of(CLASS)[:] = found.classes.counts
            if any(found.classes.counts):
                limits[CLASS] = found.classes.limit
            if found.segments is not None:
                if len(found.segments.counts) != len(found.classes.counts):
                    raise ValueError("segments and classes differ in number")
                counts.of(SEGMENT)[:] = found.segments.counts
                limits[SEGMENT] = found.segments.limit
        except (ValidationError, ValueError, TypeError) as error:
            reason = str(error).splitlines()[0][:200]
            raise ArchiveError(f"{ENTRY} is malformed ({reason}); record it again") from None
        return cls(counts, limits, found.score_thr, found.recording)


def reference_of(
    blocks: Sequence[Counts], score_thr: float, window: int, recording: Recording | None = None
) -> Reference:
    """Make a reference of frames, or of blocks of frames.

    Args:
        blocks: counts of each frame or block, in the order of time; of one layout.
        score_thr: that they were counted with.
        window: least blocks of a window that is compared with it.
        recording: how the frames were counted.
    """
    layout = blocks[0].layout
    total = layout.empty()
    for block in blocks:
        total.add(block)
    rows: npt.NDArray[np.int64] = np.stack([block.bins for block in blocks])
    limits = {
        name: chance_limit(rows[:, place], window)
        for name, place in layout.slices.items()
        if total.bins[place].any()
    }
    return Reference(total, limits, score_thr, recording)

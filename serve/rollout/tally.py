"""Counts of changes by class, score and distance."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from serve.compare.changes import Change, Kind

__all__ = ["Tally", "distance_bin", "score_bin"]

KINDS: tuple[Kind, ...] = ("matched", "renamed", "lost", "new")
_DISTANCES_M = (20, 40, 60)
_SCORES = (0.5, 0.7)


@dataclass
class Tally:
    """Changes of a group of detections.

    Attributes:
        counts: number of changes of each kind.
        crossed: pairs of which only one score reaches the threshold.
        score_shift: sum of the score shifts of pairs.
        largest_shift: score shift of the largest amount.
        moved: sum of the distances of pairs; metres in 3D, 1 - IoU in 2D.
        most_moved: largest distance of a pair.
    """

    counts: Counter[Kind] = field(default_factory=Counter)
    crossed: int = 0
    score_shift: float = 0.0
    largest_shift: float = 0.0
    moved: float = 0.0
    most_moved: float = 0.0

    def add(self, changes: Iterable[Change]) -> None:
        """Count changes."""
        for change in changes:
            self.counts[change.kind] += 1
            self.crossed += change.crossed
            self.score_shift += change.score_shift
            self.largest_shift = max(self.largest_shift, change.score_shift, key=abs)
            self.moved += change.moved
            self.most_moved = max(self.most_moved, change.moved)

    @property
    def before(self) -> int:
        """Detections of the first version, with partners of the second below the threshold."""
        return self.counts["matched"] + self.counts["renamed"] + self.counts["lost"]

    @property
    def pairs(self) -> int:
        """Detections of both versions."""
        return self.counts["matched"] + self.counts["renamed"]

    def share(self, kind: Kind) -> float:
        """Return changes of a kind as a share of the first version's detections; of none, 1 if there is any."""
        return self.counts[kind] / self.before if self.before else float(self.counts[kind] > 0)

    @property
    def mean_shift(self) -> float:
        """Mean score shift of pairs."""
        return self.score_shift / self.pairs if self.pairs else 0.0

    @property
    def mean_moved(self) -> float:
        """Mean distance of pairs."""
        return self.moved / self.pairs if self.pairs else 0.0

    def figures(self) -> Mapping[str, Any]:
        """Return the figures by name, for JSON."""
        return {
            **{kind: self.counts[kind] for kind in KINDS},
            "crossed": self.crossed,
            "mean_score_shift": round(self.mean_shift, 6),
            "largest_score_shift": round(self.largest_shift, 6),
            "mean_moved": round(self.mean_moved, 6),
            "most_moved": round(self.most_moved, 6),
        }


def score_bin(score: float) -> str:
    """Name the group of a score; names of higher scores sort later."""
    return f"score {_bin(score, _SCORES)}"


def distance_bin(range_m: float) -> str:
    """Name the group of a distance from the sensor, metres; names of larger distances sort later."""
    return f"{_bin(range_m, _DISTANCES_M)} m"


def _bin(value: float, edges: tuple[float, ...]) -> str:
    low: float = 0
    for edge in edges:
        if value < edge:
            return f"{low:g} to {edge:g}"
        low = edge
    return f"{low:g} and more"

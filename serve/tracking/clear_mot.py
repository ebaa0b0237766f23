"""CLEAR MOT metrics of tracks: MOTA, MOTP and the switches of ids.

K. Bernardin and R. Stiefelhagen, *Evaluating Multiple Object Tracking Performance: The CLEAR MOT Metrics*, EURASIP
Journal on Image and Video Processing 2008. An object keeps the track that it had while they stay within reach; the
others are assigned by the least total distance. MOTA is 1 less the share of misses, false tracks and switches in all
objects.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

__all__ = ["ClearMot"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass
class ClearMot:
    """Counts over a sequence, frame by frame.

    Attributes:
        reach: longest distance of an object and its track, in the unit of the places.
        objects: objects, summed over frames.
        misses: objects without a track.
        false_tracks: tracks without an object.
        switches: objects whose track has another id than the one before.
        fragments: objects that get a track again after they had none.
        distance: of objects and their tracks, summed.
    """

    reach: float = 2.0
    objects: int = 0
    misses: int = 0
    false_tracks: int = 0
    switches: int = 0
    fragments: int = 0
    distance: float = 0.0
    _last: dict[int, int] = field(default_factory=dict, repr=False)  # object → its latest track
    _current: dict[int, int] = field(default_factory=dict, repr=False)  # of the frame before

    @classmethod
    def total(cls, scores: Iterable[ClearMot]) -> ClearMot:
        """Sum the counts of several sequences or classes."""
        total = cls()
        for score in scores:
            for name in ("objects", "misses", "false_tracks", "switches", "fragments", "distance"):
                setattr(total, name, getattr(total, name) + getattr(score, name))
        return total

    def update(self, objects: Ints, places: Floats, tracks: Ints, found: Floats) -> None:
        """Count a frame.

        Args:
            objects: (N,) true ids.
            places: (N, D) their places.
            tracks: (M,) ids of tracks.
            found: (M, D) their places.
        """
        from scipy.optimize import linear_sum_assignment

        apart = np.linalg.norm(places[:, None] - found[None], axis=-1)
        rows = {int(name): i for i, name in enumerate(objects)}
        columns = {int(name): j for j, name in enumerate(tracks)}
        pairs = {
            name: track
            for name, track in self._current.items()
            if name in rows and track in columns and apart[rows[name], columns[track]] <= self.reach
        }
        free = [name for name in rows if name not in pairs]
        taken = set(pairs.values())
        unused = [track for track in columns if track not in taken]
        if free and unused:
            cost = apart[np.ix_([rows[name] for name in free], [columns[track] for track in unused])]
            cost = np.where(cost <= self.reach, cost, 1e9)
            for i, j in zip(*linear_sum_assignment(cost), strict=True):
                if cost[i, j] <= self.reach:
                    pairs[free[i]] = unused[j]
        for name, track in pairs.items():
            self.switches += name in self._last and self._last[name] != track
            self.fragments += name in self._last and name not in self._current
            self.distance += float(apart[rows[name], columns[track]])
        self.objects += len(rows)
        self.misses += len(rows) - len(pairs)
        self.false_tracks += len(columns) - len(pairs)
        self._last.update(pairs)
        self._current = pairs

    @property
    def mota(self) -> float:
        """Multiple object tracking accuracy, 1 at best, without a lower bound; NaN without an object."""
        wrong = self.misses + self.false_tracks + self.switches
        return 1 - wrong / self.objects if self.objects else float("nan")

    @property
    def motp(self) -> float:
        """Mean distance of objects and their tracks; NaN without one."""
        found = self.objects - self.misses
        return self.distance / found if found else float("nan")

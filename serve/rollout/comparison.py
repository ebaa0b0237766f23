"""Comparison of two models on the frames of a source, one frame at a time."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from serve.compare.changes import Change, ChangeRules, find_changes
from serve.errors import SettingsError
from serve.predict.frames import Frame, Prediction
from serve.predict.models import Model
from serve.predict.pipeline import predict_frames
from serve.predict.sources import Source
from serve.protocol.options import FrameOptions
from serve.rollout.tally import Tally, distance_bin, score_bin

__all__ = ["FrameChanges", "RolloutComparison", "compare_models"]


@dataclass(frozen=True)
class FrameChanges:
    """Changes of one frame.

    Attributes:
        frame: the frame.
        changes: of its detections; empty if a version failed.
        answers: of both versions; None where it failed.
        errors: code and message of each version's error; None where it answered.
    """

    frame: Frame
    changes: tuple[Change, ...]
    answers: tuple[Mapping[str, Any] | None, Mapping[str, Any] | None]
    errors: tuple[str | None, str | None]

    @property
    def weight(self) -> float:
        """How much changed: the scores of what was lost, new or renamed and the shifts of the others, added up."""
        return sum(
            abs(change.score_shift) if change.kind == "matched" else change.score for change in self.changes
        )

    def record(self) -> Mapping[str, Any]:
        """Return the frame and what changed, for JSON; pairs without their rows are left out."""
        shown = [
            {
                "kind": change.kind,
                "name": change.name,
                **({"renamed_to": change.renamed_to} if change.renamed_to else {}),
                "score": round(change.score, 4),
                **({"range_m": round(change.range_m, 2)} if change.range_m is not None else {}),
                "rows": change.rows,
            }
            for change in self.changes
            if change.kind != "matched"
        ]
        errors = {} if self.errors == (None, None) else {"errors": self.errors}
        matched = len(self.changes) - len(shown)
        return {"frame": self.frame.name, "matched": matched, "changes": shown, **errors}


@dataclass
class RolloutComparison:
    """Changes of all frames.

    Attributes:
        frames: frames that both versions answered.
        failed_before: frames that only the first version failed on.
        failed_after: frames that only the second version failed on.
        failed_both: frames that both failed on.
        total: changes of all detections.
        by_class: changes by class; of a renamed one, that before.
        by_score: changes by score.
        by_distance: changes by distance from the sensor; empty in 2D.
        worst: frames with the largest changes, the worst first.
        is_3d: whether there are 3D boxes.
    """

    frames: int = 0
    failed_before: int = 0
    failed_after: int = 0
    failed_both: int = 0
    total: Tally = field(default_factory=Tally)
    by_class: defaultdict[str, Tally] = field(default_factory=lambda: defaultdict(Tally))
    by_score: defaultdict[str, Tally] = field(default_factory=lambda: defaultdict(Tally))
    by_distance: defaultdict[str, Tally] = field(default_factory=lambda: defaultdict(Tally))
    worst: list[FrameChanges] = field(default_factory=list)
    is_3d: bool = False

    def add(self, found: FrameChanges) -> None:
        """Count one frame."""
        before, after = (error is not None for error in found.errors)
        if before or after:
            self.failed_both += before and after
            self.failed_before += before and not after
            self.failed_after += after and not before
            return
        self.frames += 1
        self.total.add(found.changes)
        for change in found.changes:
            self.by_class[change.name].add([change])
            self.by_score[score_bin(change.score)].add([change])
            if change.range_m is not None:
                self.is_3d = True
                self.by_distance[distance_bin(change.range_m)].add([change])


def compare_models(
    source: Source,
    before: Model,
    after: Model,
    rules: ChangeRules,
    *,
    columns: str | None = None,
    batch_size: int = 1,
    keep_worst: int = 0,
    observe: Callable[[FrameChanges], None] = lambda found: None,
) -> RolloutComparison:
    """Ask two models for every frame and compare their detections; memory does not grow with the frames.

    Args:
        source: the frames; read twice, once for each model.
        before: the first version.
        after: the second version.
        rules: rules of pairing.
        columns: columns of the point clouds.
        batch_size: frames per batch.
        keep_worst: number of frames with the largest changes to keep.
        observe: called with every frame in order.

    Raises:
        ServeError: the source or a model as a whole failed, or the models answer different kinds of boxes.
    """
    if source.live:
        raise SettingsError(f"{source.what}: a camera or stream cannot be read twice; record it first")
    options = FrameOptions(score_thr=rules.lowest, columns=columns)
    comparison = RolloutComparison()
    worst: list[tuple[float, int, FrameChanges]] = []
    with (
        closing(predict_frames(source, before, options, batch_size=batch_size)) as one,
        closing(predict_frames(source, after, options, batch_size=batch_size)) as two,
    ):
        for number, (first, second) in enumerate(zip(one, two, strict=True)):
            found = _changes_of(first, second, rules)
            comparison.add(found)
            if keep_worst and found.weight:
                # Of equal weights the earlier frame is the worse: the number makes the order one.
                heapq.heappush(worst, (found.weight, -number, found))
                if len(worst) > keep_worst:
                    heapq.heappop(worst)
            observe(found)
    comparison.worst = [found for _, _, found in sorted(worst, key=lambda each: each[:2], reverse=True)]
    return comparison


def _changes_of(first: Prediction, second: Prediction, rules: ChangeRules) -> FrameChanges:
    errors = tuple(
        None if each.error is None else f"{each.error.code}: {each.error}" for each in (first, second)
    )
    changes: tuple[Change, ...] = ()
    if first.answer is not None and second.answer is not None:
        changes = tuple(find_changes(first.answer, second.answer, rules))
    return FrameChanges(first.frame, changes, (first.answer, second.answer), (errors[0], errors[1]))

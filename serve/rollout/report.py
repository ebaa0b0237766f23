"""Table, JSON, verdict and pictures of a comparison of two versions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from serve.errors import SettingsError, quote
from serve.predict.writers import Drawing
from serve.rollout.comparison import FrameChanges, RolloutComparison
from serve.rollout.tally import KINDS, Tally
from serve.visualize.detections import draw_frame, encode_png

__all__ = ["Thresholds", "draw_changes", "json_line", "table", "violations"]


@dataclass(frozen=True)
class Thresholds:
    """What may change; shares of the first version's detections.

    Attributes:
        lost: share that is lost.
        new: share that is new.
        renamed: share that has another class.
        score_shift: amount of the mean score shift.
        moved_m: mean distance of paired 3D boxes on the ground, metres.
        iou_loss: mean of 1 - IoU of paired 2D boxes.
    """

    lost: float = 0.02
    new: float = 0.02
    renamed: float = 0.01
    score_shift: float = 0.02
    moved_m: float = 0.1
    iou_loss: float = 0.05


def violations(found: RolloutComparison, limits: Thresholds) -> list[str]:
    """List what is beyond the limits, over all and of each class."""
    seen = []
    if found.failed_after:
        seen.append(f"{found.failed_after} frames fail in the second version alone")
    groups: list[tuple[str, Tally]] = [("all", found.total), *sorted(found.by_class.items())]
    for group, tally in groups:
        name = _cell(group)
        for kind, limit in (("lost", limits.lost), ("new", limits.new), ("renamed", limits.renamed)):
            if (share := tally.share(kind)) > limit:  # type: ignore[arg-type]
                count = tally.counts[kind]  # type: ignore[index]
                seen.append(f"{name}: {count} {kind} of {tally.before} = {share:.1%} (limit {limit:.1%})")
        if abs(tally.mean_shift) > limits.score_shift:
            seen.append(f"{name}: mean score shift {tally.mean_shift:+.3f} (limit {limits.score_shift:g})")
        most = limits.moved_m if found.is_3d else limits.iou_loss
        if tally.mean_moved > most:
            moved = f"{tally.mean_moved:.3f}"
            what = f"boxes moved by {moved} m" if found.is_3d else f"boxes lost {moved} of their IoU"
            seen.append(f"{name}: {what} in the mean (limit {most:g})")
    return seen


def table(found: RolloutComparison) -> str:
    """Format the counts as a table: all, by class, by score, by distance."""
    unit = "moved m" if found.is_3d else "1 - IoU"
    lines = [
        f"| detections | {' | '.join(KINDS)} | crossed | mean score shift | largest | mean {unit} | most |",
        f"| --- |{' ---: |' * (len(KINDS) + 5)}",
    ]
    for name, tally in _groups(found):
        counts = " | ".join(f"{tally.counts[kind]:,}" for kind in KINDS)
        lines.append(
            f"| {_cell(name)} | {counts} | {tally.crossed:,} | {tally.mean_shift:+.4f} | {tally.largest_shift:+.4f} "
            f"| {tally.mean_moved:.4f} | {tally.most_moved:.4f} |"
        )
    return "\n".join(lines)


def _cell(name: str) -> str:
    """Return a name as it is, or quoted if it would break the table or the terminal."""
    return name if name.isprintable() and "|" not in name else quote(name)


def _groups(found: RolloutComparison) -> Iterator[tuple[str, Tally]]:
    yield "all", found.total
    for groups in (found.by_class, found.by_score, found.by_distance):
        yield from sorted(groups.items())


def json_line(found: RolloutComparison, seen: list[str], **described: Any) -> str:
    """Return one line of JSON with everything that `table` shows, and the verdict."""
    content = {
        **described,
        "frames": found.frames,
        "failed": {
            "before": found.failed_before,
            "after": found.failed_after,
            "both": found.failed_both,
        },
        "all": found.total.figures(),
        "by_class": {name: tally.figures() for name, tally in sorted(found.by_class.items())},
        "by_score": {name: tally.figures() for name, tally in sorted(found.by_score.items())},
        "by_distance": {name: tally.figures() for name, tally in sorted(found.by_distance.items())},
        "beyond_limits": seen,
    }
    return orjson.dumps({"compare": content}).decode()


def draw_changes(found: FrameChanges, folder: Path, drawing: Drawing) -> Path:
    """Draw a frame with what changed in it: kept, lost, new and renamed detections, each in its colour.

    Returns:
        The PNG that was written.

    Raises:
        ServeError: the frame cannot be read again, or not be drawn.
    """
    answer = _as_answer(found)
    body = found.frame.read()
    try:
        image = draw_frame(
            body, answer, load_dim=drawing.load_dim or 4, size=drawing.size, title=found.frame.name
        )
    except ValueError as error:
        raise SettingsError(f"{found.frame.name} cannot be drawn: {error}") from error
    path = folder / f"{found.frame.stem.replace('/', '_')}.png"  # a stem may have dots
    path.write_bytes(encode_png(image))
    return path


def _as_answer(found: FrameChanges) -> Mapping[str, Any]:
    """Make one answer of both, whose classes say what became of a detection."""
    before, after = found.answers
    assert before is not None and after is not None
    ending = "_3d" if "bboxes_3d" in before else ""
    classes: list[str] = []
    boxes: list[Any] = []
    scores: list[float] = []
    labels: list[int] = []
    for change in sorted(found.changes, key=lambda each: -each.score):
        name = change.name if change.renamed_to is None else f"{change.name} → {change.renamed_to}"
        title = name if change.kind == "matched" else f"{change.kind} {name}"
        if title not in classes:
            classes.append(title)
        row_before, row_after = change.rows
        answer, row = (before, row_before) if row_before is not None else (after, row_after)
        boxes.append(answer[f"bboxes{ending}"][row])
        scores.append(change.score)
        labels.append(classes.index(title))
    made = {
        f"bboxes{ending}": boxes,
        f"scores{ending}": scores,
        f"labels{ending}": labels,
        "names": [classes[label] for label in labels],
        "classes": classes,
    }
    if "box_type_3d" in before:
        made["box_type_3d"] = before["box_type_3d"]
    return made

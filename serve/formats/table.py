"""Tables of detections (CSV): one row per detection, in SI units and radians or pixels, as answers have them."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from typing import Any, TextIO

from serve.errors import BadRequest

__all__ = ["write_table"]

_COLUMNS_2D = ("x1", "y1", "x2", "y2")
_COLUMNS_3D = ("x", "y", "z", "dx", "dy", "dz", "yaw", "vx", "vy")
_FIRST_COLUMNS = ("frame", "name", "label", "score")


def write_table(file: TextIO, answers: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
    """Write the table of some frames, with a header, which is that of the boxes also if there are none.

    Args:
        file: open text file without translation of line ends.
        answers: name and answer of each frame.

    Raises:
        BadRequest: an answer has labels, not detections.
    """
    rows = csv.writer(file)
    columns: tuple[str, ...] = ()
    expected: tuple[str, ...] = ()
    for frame, answer in answers:
        suffix = "_3d" if "bboxes_3d" in answer else ""
        if f"bboxes{suffix}" not in answer:
            raise BadRequest(
                "a table has one row per box, and this model gives labels; choose json or picture"
            )
        boxes = answer[f"bboxes{suffix}"]
        expected = _COLUMNS_3D[:7] if suffix else _COLUMNS_2D
        if not columns and len(boxes):  # the first box has velocities or has none
            columns = (_COLUMNS_3D if suffix else _COLUMNS_2D)[: len(boxes[0])]
            columns += ("track_id",) if "track_ids" in answer else ()
            rows.writerow((*_FIRST_COLUMNS, *columns))
        tracks: list[tuple[int, ...]] = [(track,) for track in answer.get("track_ids", ())]
        for name, label, score, box, track in zip(
            answer["names"],
            answer[f"labels{suffix}"],
            answer[f"scores{suffix}"],
            boxes,
            tracks or [()] * len(boxes),
            strict=True,
        ):
            rows.writerow((frame, name, label, score, *box, *track))
    if not columns:
        rows.writerow((*_FIRST_COLUMNS, *expected))

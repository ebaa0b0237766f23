"""Text of an evaluation: a table of the figures that people compare, and all of them as one line of JSON."""

from __future__ import annotations

import json
from typing import Any

from serve.evaluate.evaluation import Evaluation, Row

__all__ = ["json_line", "table"]

_SHOWN = ("native", "served", "difference")
# Distance of centres at which nuScenes measures its errors.
_NUSCENES_SHOWN = "AP 2.0 m"


def table(found: Evaluation) -> str:
    """Format figures per class, then those over all classes; of KITTI's and nuScenes' many, the usual ones."""
    rows = [row for row in found.rows if _is_shown(row, found.rows)]
    rows.sort(key=lambda row: row.label is None)
    alone = found.detections[0] is None
    columns = ["served"] if alone else list(_SHOWN)
    lines = [["class", "figure", *columns]]
    lines += [
        [
            row.label or "all",
            row.kind,
            *(_points(getattr(row, name), name == "difference") for name in columns),
        ]
        for row in rows
    ]
    widths = [max(len(line[k]) for line in lines) for k in range(len(lines[0]))]
    text = [
        "  ".join(
            cell.ljust(width) if k < 2 else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    omitted = len(found.rows) - len(rows)
    if omitted:
        text.append(f"... and {omitted} more figures in the line of JSON")
    return "\n".join(text)


def json_line(found: Evaluation, **about: Any) -> str:
    """Format all figures in points as one line of JSON, by class (``all`` over the classes) and figure."""
    figures: dict[str, dict[str, dict[str, float | None]]] = {}
    for row in found.rows:
        figures.setdefault(row.label or "all", {})[row.kind] = {
            name: _rounded(getattr(row, name)) for name in _SHOWN
        }
    return json.dumps(
        {
            **about,
            "frames": found.frames,
            "detections": dict(zip(("native", "served"), found.detections, strict=True)),
            "largest_difference": _rounded(found.largest_difference),
            "figures": figures,
        }
    )


def _is_shown(row: Row, rows: tuple[Row, ...]) -> bool:
    if row.label and row.kind.startswith("AP ") and row.kind.endswith(" m"):
        return row.kind == _NUSCENES_SHOWN
    if row.label and " error " in row.kind:
        return False
    if " AP40 " not in row.kind and " AP11 " not in row.kind:
        return True
    return " AP40 moderate" in row.kind and not row.kind.endswith("loose")


def _points(value: float | None, signed: bool) -> str:
    return "-" if value is None else f"{value:+.4g}" if signed and value else f"{value:.4g}"


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)

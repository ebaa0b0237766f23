"""Text and images of a comparison: tables of frames, the summary line, drawings of both sides."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from serve.client import frame_parts
from serve.compare.detections import Comparison, compare_answers, detection_count
from serve.compare.labels import LabelComparison
from serve.verify.endpoint import FrameReport
from serve.visualize.detections import draw_frame, encode_png

__all__ = ["comparison_table", "draw_report", "frame_table", "summary"]


def frame_table(report: FrameReport, max_rows: int = 20) -> str:
    """Name of a frame and the table of its comparison."""
    return f"{report.path}\n{comparison_table(report.comparison, max_rows)}"


def comparison_table(comparison: Comparison | LabelComparison, max_rows: int = 20) -> str:
    """Format a comparison: at most `max_rows` pairs, worst first, then problems, then the verdict."""
    lines = [] if isinstance(comparison, LabelComparison) else _format_pairs(comparison, max_rows)
    problems = [f"FAIL  {problem}" for problem in comparison.problems]
    return "\n".join([*lines, *problems, comparison.verdict()])


def _format_pairs(found: Comparison, max_rows: int) -> list[str]:
    """Lines of a table of pairs and unmatched detections; empty without either."""
    unit = "m" if found.is_3d else "px"
    header = ["", *found.sides, f"box [{unit}]", "score", "mask IoU", "remark"]
    if found.is_3d:
        header.insert(4, "yaw [rad]")
    rows = [header]
    ranked = sorted(found.pairs, key=lambda pair: (pair.ok, -pair.box, -pair.yaw, -pair.score))
    for pair in ranked[:max_rows]:
        same = pair.expected_label == pair.actual_label
        row = [
            "ok" if pair.ok else "tied" if found.is_tied(pair) else "FAIL",
            found.described[0][pair.expected],
            found.described[1][pair.actual],
            f"{pair.box:.1e}",
            f"{pair.score:.1e}",
            "" if pair.mask_iou is None else f"{pair.mask_iou:.4f}",
            "" if same else "label differs",
        ]
        if found.is_3d:
            row.insert(4, f"{pair.yaw:.1e}")
        rows.append(row)
    if all(not row[-2] for row in rows[1:]):  # without masks, no column for them
        rows = [[*row[:-2], row[-1]] for row in rows]
    unmatched = _list_unmatched(found)
    for verdict, side, index, remark in unmatched[:max_rows]:
        cells = ["-"] * len(rows[0])
        cells[0], cells[1 + side], cells[-1] = verdict, found.described[side][index], remark
        rows.append(cells)
    if len(rows) == 1:
        return []
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    if omitted := max(0, len(found.pairs) - max_rows) + max(0, len(unmatched) - max_rows):
        lines.append(f"... and {omitted} more, none of them worse")
    return lines


def _list_unmatched(found: Comparison) -> list[tuple[str, int, int, str]]:
    """(verdict, side, index, remark) of every detection without a partner."""
    borderline = f"borderline: score within {found.tolerances.score:g} of the threshold {found.score_thr:g}"
    rows = []
    for side, (unmatched, tied) in enumerate(
        ((found.unmatched_expected, found.tied_expected), (found.unmatched_actual, found.tied_actual))
    ):
        rows += [("tied" if i in tied else "FAIL", side, i, f"only {found.sides[side]}") for i in unmatched]
    rows += [("ok", 0, i, borderline) for i in found.borderline_expected]
    rows += [("ok", 1, i, borderline) for i in found.borderline_actual]
    return rows


def summary(reports: Sequence[FrameReport]) -> str:
    """Format the number of matching frames and the largest deviations over all frames, with notes."""
    bad = [report.path.name for report in reports if not report.comparison.ok]
    labels = [report.comparison for report in reports if isinstance(report.comparison, LabelComparison)]
    if labels:
        share = min(comparison.share for comparison in labels)
        word = "MISMATCH" if bad else "match"
        return (
            f"{word}: {len(labels) - len(bad)} of {len(labels)} frames agree; least share of {labels[0].unit} with the "
            f"same label: {share:.4%}"
        )
    found = [report.comparison for report in reports if isinstance(report.comparison, Comparison)]
    pairs = sum(len(comparison.pairs) for comparison in found)
    lines = [
        f"{'MISMATCH' if bad else 'match'}: {len(found) - len(bad)} of {len(found)} frames agree, "
        f"{pairs} detections compared; largest deviation over all: {_format_largest(found)}"
    ]
    if bad:
        lines.append(f"frames that differ: {', '.join(bad[:10])}{', ...' if len(bad) > 10 else ''}")
    references = [report.reference for report in reports]
    constant = len(references) > 1 and all(compare_answers(references[0], each).ok for each in references[1:])
    if constant and detection_count(references[0]):
        lines.append("note: the detections are the same in every frame; such weights hide a wrong input")
    if not any(detection_count(side) for report in reports for side in (report.reference, report.served)):
        lines.append("note: neither side has detections; lower --score-thr to compare more")
    return "\n".join(lines)


def _format_largest(found: Sequence[Comparison]) -> str:
    """Largest deviations over all comparisons, with units."""
    unit = "m" if any(comparison.is_3d for comparison in found) else "px"
    largest = [f"box {max((c.largest_box for c in found), default=0.0):.1e} {unit}"]
    if unit == "m":
        largest.append(f"yaw {max((c.largest_yaw for c in found), default=0.0):.1e} rad")
    largest.append(f"score {max((c.largest_score for c in found), default=0.0):.1e}")
    ious = [c.smallest_mask_iou for c in found if c.smallest_mask_iou is not None]
    if ious:
        largest.append(f"mask IoU {min(ious):.4f}")
    return ", ".join(largest)


def draw_report(report: FrameReport, folder: str | Path, load_dim: int | None = None) -> list[Path]:
    """Draw both sides of a frame as ``NAME.native.png`` and ``NAME.served.png`` into ``folder``.

    Returns:
        The files written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    parts = frame_parts(report.path)
    body = {name: file.read_bytes() for name, file in parts.items()} if parts else report.path.read_bytes()
    written = []
    for side, detections in (("native", report.reference), ("served", report.served)):
        image = draw_frame(body, detections, load_dim=load_dim or 4, title=f"{report.path.name}, {side}")
        written.append(folder / f"{report.path.name}.{side}.png")
        written[-1].write_bytes(encode_png(image))
    return written

"""Parquet from predictions: one row per frame, one schema for every model, null where an answer has no such field.

Columns have the names of an answer (docs/answers.md), so does what they hold: metres and radians, or pixels. Lists of
one frame have one entry per detection. Labels of points are decoded to a list of integers, a panoptic picture to the
bytes of its PNG. ``classes`` and ``units``, which all frames of a model share, are key-value metadata of the file, as
JSON. Fields that have no column are JSON in ``other``.

`pyarrow` is optional: ``pip install 'mmdet3d-serve[parquet]'``.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import IO, Any

from serve.errors import BadRequest, MissingPackage
from serve.formats.labels import decode_labels

__all__ = ["SHARED", "load_pyarrow", "schema", "write_parquet"]

#: Fields that all answers of a model share: metadata of the file.
SHARED = ("classes", "units")
# Bounds of a row group, which is in memory while it is written: rows, and labels of points in them.
_ROWS, _LABELS = 1000, 4_000_000
_PLAIN = (
    *("box_type_3d", "bboxes_3d", "scores_3d", "labels_3d"),
    *("bboxes", "scores", "labels", "names", "masks", "track_ids"),
    *("segments_info", "warnings", "model"),
)
_DECODED = ("pts_semantic_mask", "panoptic_seg")


def load_pyarrow() -> Any:
    """Import pyarrow.

    Raises:
        MissingPackage: it is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingPackage(
            "Parquet needs pyarrow, which is not installed: pip install 'mmdet3d-serve[parquet]'"
        ) from error
    return pyarrow


def schema() -> Any:
    """Return the columns, a ``pyarrow.Schema``; all but ``frame`` may be null."""
    pa = load_pyarrow()
    boxes, floats, integers, text = (
        pa.list_(pa.list_(pa.float32())),
        pa.list_(pa.float32()),
        pa.list_(pa.int32()),
        pa.string(),
    )
    mask = pa.struct([("size", integers), ("counts", text)])
    segment = pa.struct(
        [
            ("id", pa.int64()),
            ("category_id", pa.int32()),
            ("name", text),
            ("isthing", pa.bool_()),
            ("area", pa.int64()),
            ("bbox", floats),
        ]
    )
    return pa.schema(
        [
            pa.field("frame", text, nullable=False),
            ("error_code", text),
            ("error_message", text),
            ("box_type_3d", text),
            ("bboxes_3d", boxes),
            ("scores_3d", floats),
            ("labels_3d", integers),
            ("bboxes", boxes),
            ("scores", floats),
            ("labels", integers),
            ("names", pa.list_(text)),
            ("masks", pa.list_(mask)),
            ("track_ids", pa.list_(pa.int64())),
            ("pts_semantic_mask", pa.list_(pa.uint32())),
            ("panoptic_png", pa.binary()),
            ("segments_info", pa.list_(segment)),
            ("warnings", pa.list_(pa.struct([("code", text), ("message", text)]))),
            ("model", pa.struct([("name", text), ("version", text)])),
            ("other", text),
        ]
    )


def write_parquet(file: IO[bytes], lines: Iterable[Mapping[str, Any]]) -> None:
    """Write recorded predictions, row group by row group; the same lines give the same bytes.

    Args:
        file: open for writing.
        lines: lines of a run's record, with an ``answer`` or an ``error``.

    Raises:
        BadRequest: a field of an answer has values of another type than its column.
        MissingPackage: pyarrow is not installed.
    """
    pa = load_pyarrow()
    columns, shared = schema(), dict[str, str]()
    with pa.parquet.ParquetWriter(file, columns, compression="zstd") as writer:
        for group in _row_groups(_rows(lines, shared)):
            try:
                writer.write_table(pa.Table.from_pylist(group, schema=columns))
            except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
                raise BadRequest(
                    f"frames {group[0]['frame']} to {group[-1]['frame']} do not fit the Parquet schema ({error}); "
                    "choose jsonl"
                ) from error
        if shared:
            writer.add_key_value_metadata(shared)


def _row_groups(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    group, labels = list[dict[str, Any]](), 0
    for row in rows:
        group.append(row)
        labels += len(row.get("pts_semantic_mask", ()))
        if len(group) >= _ROWS or labels >= _LABELS:
            yield group
            group, labels = [], 0
    if group:
        yield group


def _rows(lines: Iterable[Mapping[str, Any]], shared: dict[str, str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        error, answer = line.get("error") or {}, line.get("answer") or {}
        for name in SHARED:
            if name in answer:
                shared.setdefault(name, json.dumps(answer[name]))
        row = {name: answer.get(name) for name in _PLAIN}
        if (labels := answer.get("pts_semantic_mask")) is not None:
            try:
                row["pts_semantic_mask"] = decode_labels(labels).ravel()
            except ValueError as problem:
                raise BadRequest(f"{line['frame']}: {problem}") from problem
        if (panoptic := answer.get("panoptic_seg")) is not None:
            row["panoptic_png"] = base64.b64decode(panoptic["png_b64"])
        others = {name: value for name, value in answer.items() if name not in (*_PLAIN, *_DECODED, *SHARED)}
        yield {
            "frame": line["frame"],
            "error_code": error.get("code"),
            "error_message": error.get("message"),
            "other": json.dumps(others) if others else None,
            **row,
        }

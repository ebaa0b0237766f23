"""Options of a prediction, and the headers that carry them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TypedDict

from serve.errors import UnknownOption

__all__ = ["PredictOptions", "option_headers"]


class PredictOptions(TypedDict, total=False):
    """Options of a prediction; what is left out is as the server has it.

    Attributes:
        score_thr: minimum score of a detection, 0 to 1.
        max_detections: maximum number of detections, best first.
        classes: names of the classes to keep.
        class_thr: minimum score by class, in place of `score_thr`.
        fields: names of the fields that the answer has.
        columns: columns of the point cloud, as in ``x,y,z,intensity=0``.
        load_dim: numbers per point, which the server checks.
        num_points: number of points, which the server checks; required for an empty ``.bin``.
        sweeps: ``accumulated`` if the point cloud has the points and times of several sweeps.
        track_session: name of the sequence that the frame continues (docs/tracking.md).
        track_start: begin the sequence.
        track_end: close the sequence after this frame.
        frame_time_s: time of the frame, seconds from any origin.
    """

    score_thr: float | None
    max_detections: int | None
    classes: list[str] | tuple[str, ...] | str | None
    class_thr: Mapping[str, float] | str | None
    fields: list[str] | tuple[str, ...] | str | None
    columns: str | None
    load_dim: int | None
    num_points: int | None
    sweeps: str | None
    track_session: str | None
    track_start: bool | None
    track_end: bool | None
    frame_time_s: float | str | None


def option_headers(options: PredictOptions) -> dict[str, str]:
    """Return options as headers, because TorchServe drops the query string of ``/predictions``."""
    known = PredictOptions.__annotations__
    unknown = [name for name in options if name not in known]
    if unknown:
        raise UnknownOption(f"unknown option {unknown[0]!r}; known: {', '.join(sorted(known))}")
    return {
        f"X-{name.replace('_', '-').title()}": _option_text(value)
        for name, value in options.items()
        if value is not None
    }


def _option_text(value: object) -> str:
    if isinstance(value, str):
        return value if value.isascii() else json.dumps(value.split(","))
    if isinstance(value, Mapping):
        return json.dumps(dict(value))
    return json.dumps(list(value)) if isinstance(value, list | tuple) else str(value)

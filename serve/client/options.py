"""Options of a prediction, and the headers that carry them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import TypedDict

import numpy as np

from serve.errors import UnknownOption

__all__ = ["PredictOptions", "option_headers"]

# What is an option elsewhere, and how the client has it.
_ELSEWHERE = {
    "timeout_ms": "the deadline is timeout_s, in seconds",
    "camera": "to_kitti of the result takes the calibration",
    "token": "it is an argument of the client",
    "format": "a result has to_kitti and to_coco",
}


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
    classes: Iterable[str] | None
    class_thr: Mapping[str, float] | str | None
    fields: Iterable[str] | None
    columns: str | None
    load_dim: int | None
    num_points: int | None
    sweeps: str | None
    track_session: str | None
    track_start: bool | None
    track_end: bool | None
    frame_time_s: float | str | None


def option_headers(options: PredictOptions) -> dict[str, str]:
    """Return options as headers, because TorchServe drops the query string of ``/predictions``.

    Raises:
        UnknownOption: an unknown name, for which the message says what is meant, or a value that is none.
    """
    known = PredictOptions.__annotations__
    unknown = [name for name in options if name not in known]
    if unknown:
        meant = _ELSEWHERE.get(unknown[0], f"known: {', '.join(sorted(known))}")
        raise UnknownOption(f"unknown option {unknown[0]!r}; {meant}")
    return {
        f"X-{name.replace('_', '-').title()}": _option_text(name, value)
        for name, value in options.items()
        if value is not None
    }


def _option_text(name: str, value: object) -> str:
    """Return the value of an option as a header holds it: printable ASCII, as JSON where there is another sign."""
    if isinstance(value, str):
        value = value.strip()  # space around it is no part of a header (RFC 9110, 5.5)
        return value if value.isascii() and value.isprintable() else _as_json(name, value)
    if isinstance(value, np.generic):
        value = value.item()
    try:
        if isinstance(value, Mapping):
            return json.dumps(dict(value), default=_as_number)
        return json.dumps([str(each) for each in value]) if isinstance(value, Iterable) else str(value)
    except (TypeError, ValueError) as error:
        raise UnknownOption(f"{name} cannot be sent: {error}") from error


def _as_json(name: str, text: str) -> str:
    """Return names with commas between them, or scores by name, as JSON; text that is JSON already, in ASCII."""
    try:
        if text.lstrip().startswith(("[", "{")):
            return json.dumps(json.loads(text))
        if name in ("classes", "fields"):
            return json.dumps([each.strip() for each in text.split(",")])
        if name == "class_thr":
            pairs = (each.rsplit("=", 1) for each in text.split(","))
            return json.dumps({label.strip(): float(score) for label, score in pairs})
    except ValueError:
        pass
    raise UnknownOption(f"{name} cannot be {text!r}")


def _as_number(value: object) -> object:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"a {type(value).__name__} is no number")

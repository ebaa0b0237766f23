"""Options of one frame: names, defaults and bounds, from a query, a form or JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from serve.errors import UnknownOption, quote
from serve.protocol.option_places import unknown_option
from serve.protocol.point_columns import parse_columns
from serve.protocol.selection import parse_classes, parse_fields, parse_thresholds
from serve.protocol.sweeps import check_sweeps_option

__all__ = ["DEFAULT_OPTIONS", "FrameOptions", "parse_options"]


@dataclass(frozen=True)
class FrameOptions:
    """Options of one frame.

    Attributes:
        score_thr: minimum score of a detection, 0 to 1.
        max_detections: maximum number of detections, best first; None keeps all.
        load_dim: numbers per point as declared by the caller; checked against the model.
        num_points: number of points as declared by the caller; checked against the bytes.
        columns: columns of a point as declared by the caller, such as ``x,y,z,intensity=0``
            (`serve.protocol.point_columns.parse_columns`).
        sweeps: ``accumulated`` if the points are several sweeps with their times already.
        classes: names of the classes whose detections are kept; None keeps all.
        class_thr: minimum score by class, in place of `score_thr`.
        fields: names of the fields that the answer has; None for all.
    """

    score_thr: float = 0.0
    max_detections: int | None = None
    load_dim: int | None = None
    num_points: int | None = None
    columns: str | None = None
    sweeps: str | None = None
    classes: tuple[str, ...] | None = None
    class_thr: tuple[tuple[str, float], ...] = ()
    fields: tuple[str, ...] | None = None


#: Of every frame that has none of its own.
DEFAULT_OPTIONS = FrameOptions()


def parse_options(
    values: Mapping[str, Any], base: FrameOptions | None = None, others: Iterable[str] = ()
) -> FrameOptions:
    """Parse options from query values or JSON; numbers may be strings.

    Args:
        values: values by name.
        base: values of the options that are not in `values`.
        others: names of options that may be in the same place and were read before, for messages.

    Raises:
        UnknownOption: an unknown name, for which the message says where it belongs or lists the known ones, or an
            invalid value.
    """
    if not values:  # the common case
        return base or DEFAULT_OPTIONS
    known = {each.name for each in fields(FrameOptions)}
    changes: dict[str, Any] = {}
    for name, value in values.items():
        if name not in known:
            raise unknown_option(name, known, others)
        match name:
            case "score_thr":
                changes[name] = _parse_score(name, value)
            case "columns":
                changes[name] = _check_columns(name, value)
            case "sweeps":
                changes[name] = check_sweeps_option(value)
            case "classes":
                changes[name] = parse_classes(name, value)
            case "class_thr":
                changes[name] = parse_thresholds(name, value)
            case "fields":
                changes[name] = parse_fields(name, value)
            case _:
                changes[name] = _parse_count(name, value)
    return replace(base or DEFAULT_OPTIONS, **changes)


def _parse_score(name: str, value: Any) -> float:
    try:
        number = float(value) if not isinstance(value, bool) else float("nan")
    except (TypeError, ValueError, OverflowError):
        number = float("nan")
    if not 0.0 <= number <= 1.0:
        raise UnknownOption(f"{name} must be a number from 0 to 1, got {quote(value)}")
    return number


def _check_columns(name: str, value: Any) -> str:
    if not isinstance(value, str) or len(value) > 4096:
        raise UnknownOption(f"{name} must be text, as in x,y,z,intensity=0, got {quote(value)}")
    parse_columns(value)
    return value


def _parse_count(name: str, value: Any) -> int:
    try:
        number = int(value) if isinstance(value, str) else value
    except ValueError:
        number = None
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number <= 2**31:
        raise UnknownOption(f"{name} must be an integer >= 0, got {quote(value)}")
    return number

"""Selection of what an answer has: classes, thresholds of classes, the number of detections, and fields.

A client names classes as text (``Car,Pedestrian``; ``Car=0.5,Pedestrian=0.3``) or in JSON, as a list or an object; text
that begins like JSON is JSON, for names with a comma. Everything here works on answers as dictionaries, without torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson

from serve.errors import UnknownOption, quote

if TYPE_CHECKING:
    from serve.protocol.options import FrameOptions

__all__ = ["FIELDS", "check_selection", "parse_classes", "parse_fields", "parse_thresholds", "select"]

# Fields with one entry per detection.
_PER_DETECTION = frozenset(
    ("bboxes_3d", "scores_3d", "labels_3d", "bboxes", "scores", "labels", "masks", "names")
)
#: Fields that an answer may have; docs/answers.md describes them.
FIELDS = (
    "bboxes_3d", "scores_3d", "labels_3d", "box_type_3d", "bboxes", "scores", "labels", "masks", "names",
    "pts_semantic_mask", "panoptic_seg", "segments_info", "classes", "units", "model", "warnings",
)  # fmt: skip
_MAX_TEXT_CHARS = 32 * 1024  # LVIS has 1203 classes
_MAX_NAMES = 4096
_SHOWN_NAMES = 12


def parse_classes(name: str, value: Any) -> tuple[str, ...]:
    """Parse names of classes.

    Args:
        name: of the option, for messages.
        value: text with commas, JSON text, or a list.

    Raises:
        UnknownOption: not such names, too many, or none.
    """
    value = _parse_text(name, value)
    names = [each.strip() for each in value.split(",")] if isinstance(value, str) else value
    if (
        not isinstance(names, list)
        or not 0 < len(names) <= _MAX_NAMES
        or not all(isinstance(each, str) and each for each in names)
    ):
        raise UnknownOption(
            f'{name} must be names with commas between them, or a JSON list such as ["Car"], got {quote(value)}'
        )
    return tuple(dict.fromkeys(names))


def parse_thresholds(name: str, value: Any) -> tuple[tuple[str, float], ...]:
    """Parse minimum scores by class, in the order given.

    Args:
        name: of the option, for messages.
        value: text such as ``Car=0.5,Pedestrian=0.3``, JSON text, or an object.

    Raises:
        UnknownOption: not such scores, a class twice, too many, or none.
    """
    value = _parse_text(name, value)
    if isinstance(value, str):
        pairs: list[tuple[Any, Any]] = [tuple(each.rsplit("=", 1)) for each in value.split(",")]  # type: ignore[misc]
    elif isinstance(value, Mapping):
        pairs = list(value.items())
    else:
        pairs = []
    if not 0 < len(pairs) <= _MAX_NAMES or any(len(pair) != 2 for pair in pairs):
        raise UnknownOption(
            f'{name} must be as in Car=0.5,Pedestrian=0.3, or a JSON object such as {{"Car": 0.5}}, got {quote(value)}'
        )
    found: dict[str, float] = {}
    for label, score in pairs:
        label = str(label).strip()
        try:
            number = float(score) if not isinstance(score, bool) else float("nan")
        except (TypeError, ValueError, OverflowError):
            number = float("nan")
        if not label or label in found or not 0.0 <= number <= 1.0:
            raise UnknownOption(
                f"{name} must give each class once a number from 0 to 1, got {quote(label)}: {quote(score)}"
            )
        found[label] = number
    return tuple(found.items())


def parse_fields(name: str, value: Any) -> tuple[str, ...]:
    """Parse names of fields of an answer.

    Args:
        name: of the option, for messages.
        value: text with commas, JSON text, or a list.

    Raises:
        UnknownOption: a name that no answer has, or none.
    """
    names = parse_classes(name, value)
    unknown = [each for each in names if each not in FIELDS]
    if unknown:
        raise UnknownOption(f"{name}: no answer has {quote(unknown[0])}; known: {', '.join(FIELDS)}")
    return names


def _parse_text(name: str, value: Any) -> Any:
    """Return a text or, of text that begins like JSON, what it holds."""
    if not isinstance(value, str):
        return value
    if len(value) > _MAX_TEXT_CHARS:
        raise UnknownOption(f"{name} has {len(value)} characters, the limit is {_MAX_TEXT_CHARS}")
    if not value.lstrip().startswith(("[", "{")):
        return value
    try:
        return orjson.loads(value)
    except orjson.JSONDecodeError as error:
        raise UnknownOption(f"{name} begins like JSON and is none: {error}") from None


def check_selection(options: FrameOptions, classes: Sequence[str]) -> None:
    """Check that the model has the classes that the options of a frame name.

    Raises:
        UnknownOption: it has not; the message suggests those that it has.
    """
    if options.classes is None and not options.class_thr:
        return
    for name in (*(options.classes or ()), *(label for label, _ in options.class_thr)):
        if name not in classes:
            close = difflib.get_close_matches(name, classes, n=1)
            shown = f"did you mean {quote(close[0])}?" if close else f"its classes: {_shorten(classes)}"
            raise UnknownOption(f"this model has no class {quote(name)}; {shown}")


def _shorten(names: Sequence[str]) -> str:
    more = f", … ({len(names)})" if len(names) > _SHOWN_NAMES else ""
    return ", ".join(names[:_SHOWN_NAMES]) + more


def select(answer: dict[str, Any], options: FrameOptions) -> dict[str, Any]:
    """Select from an answer what the options of its frame ask for.

    Detections are sorted by score and stay so; labels of points and pixels are unchanged.

    Args:
        answer: an answer with all detections.
        options: `score_thr` (of a class with a threshold of its own, that instead; 0 keeps all), `classes`,
            `max_detections` (of what is left), `fields`.

    Raises:
        UnknownOption: a field that answers of this model do not have.
    """
    scores = answer.get("scores", answer.get("scores_3d"))
    if scores is not None:
        if options.classes is None and not options.class_thr:
            answer = _cut(answer, scores, options)
        else:
            answer = _pick(answer, np.asarray(scores), options)
    return answer if options.fields is None else _project(answer, options.fields)


def _cut(answer: dict[str, Any], scores: Any, options: FrameOptions) -> dict[str, Any]:
    """Keep the first detections, which are the best."""
    count = len(scores)
    if options.score_thr > 0:  # scores may be negative, as in Part-A2
        count = int(np.count_nonzero(np.asarray(scores) >= options.score_thr))
    if options.max_detections is not None:
        count = min(count, options.max_detections)
    return {key: value[:count] if key in _PER_DETECTION else value for key, value in answer.items()}


def _pick(answer: dict[str, Any], scores: Any, options: FrameOptions) -> dict[str, Any]:
    """Keep the detections of the wanted classes that reach the thresholds of their classes."""
    names, thresholds = answer["names"], dict(options.class_thr)
    wanted = None if options.classes is None else frozenset(options.classes)
    # In the scores' own precision: 0.3 as float32 reaches a threshold of 0.3.
    lowest = np.array([thresholds.get(name, options.score_thr) for name in names], scores.dtype)
    keep = (scores >= lowest) | (lowest <= 0)
    if wanted is not None:
        keep &= np.fromiter((name in wanted for name in names), bool, len(names))
    rows = np.flatnonzero(keep)[: options.max_detections]
    return {key: value if key not in _PER_DETECTION else _take(value, rows) for key, value in answer.items()}


def _take(values: Any, rows: Any) -> Any:
    return values[rows] if isinstance(values, np.ndarray) else [values[row] for row in rows]


def _project(answer: Mapping[str, Any], fields: Sequence[str]) -> dict[str, Any]:
    """Keep the fields that were asked for; warnings are in an answer only if there are any."""
    missing = [name for name in fields if name not in answer and name != "warnings"]
    if missing:
        raise UnknownOption(
            f"answers of this model have no {quote(missing[0])}; they have {', '.join(sorted(answer))}"
        )
    return {name: answer[name] for name in fields if name in answer}

"""Class names of a model: where they come from, and whether they fit the head.

In upstream's order: what the user says, the checkpoint (``dataset_meta``, ``CLASSES``), the config (``metainfo`` with
``classes`` or ``CLASSES``, a file with one name per line, ``class_names``), the type of its data set. Names are never
guessed: a number of names that is not the head's number of classes is an error that says how to name them.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve.convert.name_lists import last_named, ordered_names
from serve.errors import ArchiveError
from serve.runtime.pipeline import dataset_of

__all__ = [
    "ClassNames",
    "check_against_head",
    "configured_classes",
    "find_class_names",
    "head_class_count",
    "read_class_names",
]

_MAX_FILE_BYTES = 10 << 20
_HOW = (
    "name them with --classes cat,dog or --classes FILE (one name per line), or in the config as "
    "metainfo=dict(classes=(…))"
)


@dataclass(frozen=True)
class ClassNames:
    """Names by label, and where they come from.

    Attributes:
        names: class names in the order of the labels.
        source: for messages, as ``the checkpoint``.
    """

    names: tuple[str, ...]
    source: str


def read_class_names(text: str) -> tuple[str, ...]:
    """Read the option ``--classes``: names separated by commas, or a file with one name per line.

    Raises:
        ArchiveError: the file cannot be read, or a name stands twice.
    """
    path = Path(text).expanduser()
    is_file = path.is_file()
    names = _lines(path) if is_file else [name.strip() for name in text.split(",")]
    found = tuple(name for name in names if name)
    if not found:
        raise ArchiveError(f"--classes {text} names no class")
    _check_unique("--classes", found)
    return found


def _check_unique(source: str, names: Sequence[str]) -> None:
    """Raise if a name stands for two labels, or is blank: clients could not tell the detections apart."""
    first: dict[str, int] = {}
    for label, name in enumerate(names):
        if not name.strip():
            raise ArchiveError(f"{source} gives label {label} no name but {name!r}; {_HOW}")
        if first.setdefault(name, label) != label:
            raise ArchiveError(
                f"{source} names '{name}' twice, as label {first[name]} and {label}; give every class a name of its "
                f"own; {_HOW}"
            )


def find_class_names(
    config: Mapping[str, Any], checkpoint: Sequence[str] = (), given: Sequence[str] = ()
) -> ClassNames:
    """Find the class names of a resolved config and its checkpoint; no names if nothing gives any."""
    if given:
        return ClassNames(tuple(given), "--classes")
    if checkpoint:
        return ClassNames(tuple(checkpoint), "the checkpoint")
    dataset = dataset_of(config)
    for source, metainfo in (
        ("the config's data set", dataset.get("metainfo")),
        ("the config's metainfo", config.get("metainfo")),
        ("the config's class_names", {"classes": config.get("class_names")}),
    ):
        if isinstance(metainfo, Mapping):
            named = last_named(metainfo)
            if named is not None:
                return ClassNames(_names(named), source)
    named = _dataset_type_classes(dataset.get("type"), str(config["default_scope"]))
    return ClassNames(tuple(named), f"the data set type {dataset.get('type')}")


def configured_classes(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Class names that a resolved config gives by itself; empty if it gives none."""
    return find_class_names(config).names


def check_against_head(classes: ClassNames, model: Mapping[str, Any]) -> None:
    """Compare the number of names with the head's number of classes.

    Raises:
        ArchiveError: there are no names, two alike, or not as many as classes.
    """
    if not classes.names:
        raise ArchiveError(f"neither the checkpoint nor the config names the classes; {_HOW}")
    _check_unique(classes.source, classes.names)
    count = head_class_count(model)
    allowed = _allowed_counts(model, count)
    if count is not None and len(classes.names) not in allowed:
        some = ", ".join(classes.names[:4]) + (", …" if len(classes.names) > 4 else "")
        raise ArchiveError(
            f"the head has {count} classes, but {classes.source} names {len(classes.names)} ({some}); {_HOW}"
        )


def head_class_count(model: Mapping[str, Any]) -> int | None:
    """Count the classes of a model's head by its config; None: the config does not say."""
    for head in _heads(model):
        if isinstance(tasks := head.get("tasks"), list | tuple) and tasks:
            return sum(int(task.get("num_class", len(task.get("class_names", ())))) for task in tasks)
        if "num_things_classes" in head:
            return int(head["num_things_classes"]) + int(head.get("num_stuff_classes", 0))
        if isinstance(head.get("num_classes"), int):
            return int(head["num_classes"])
    return None


def _allowed_counts(model: Mapping[str, Any], count: int | None) -> tuple[int, ...]:
    """Numbers of names that fit: a segmentor's last class may be "nothing", panoptic names may be of things only."""
    if count is None:
        return ()
    head = next(iter(_heads(model)), {})
    if "num_things_classes" in head:
        return (count, int(head["num_things_classes"]))
    if "roi_head" in model and isinstance(rpn := model.get("rpn_head"), Mapping):
        return (
            count,
            int(rpn.get("num_classes", count)),
        )  # a second stage may refine boxes whatever their class
    return (count, count - 1) if "decode_head" in model else (count,)


def _heads(model: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Heads that give the final classes, the deciding one first."""
    if isinstance(model.get("language_model"), Mapping):
        return  # the classes are the words of the request
    for wrapper in ("detector", "student"):
        if isinstance(model.get(wrapper), Mapping):
            yield from _heads(model[wrapper])
            return
    for path in (
        ("panoptic_fusion_head",),
        ("panoptic_head",),
        ("roi_head", "bbox_head"),
        ("roi_head", "mask_head"),
        ("pts_bbox_head",),
        ("bbox_head",),
        ("mask_head",),
        ("decode_head",),
    ):
        found: Any = model
        for name in path:
            found = found.get(name) if isinstance(found, Mapping) else None
        for head in found if isinstance(found, list | tuple) else [found]:
            if isinstance(head, Mapping):
                yield head
                break


def _names(named: Any) -> tuple[str, ...]:
    """Class names of a metainfo: a list, or the path of a file with one name per line."""
    if not isinstance(named, str):
        try:
            return ordered_names(named)
        except ValueError as error:
            raise ArchiveError(f"the class names in the config cannot be read: {error}; {_HOW}") from None
    path = Path(named).expanduser()
    if not path.is_file():
        raise ArchiveError(f"the config takes its classes from {named}, which is no file; {_HOW}")
    return tuple(name for name in _lines(path) if name)


def _lines(path: Path) -> list[str]:
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise ArchiveError(f"{path} has {path.stat().st_size} bytes; a list of class names has less")
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ArchiveError(f"the class names in {path} cannot be read: {error}") from None


def _dataset_type_classes(dataset_type: Any, scope: str) -> Sequence[str]:
    """METAINFO of the data set class; building the data set would read its annotations."""
    from serve.runtime.model import suppress_warnings

    if not dataset_type:
        return ()
    with suppress_warnings():
        registry = importlib.import_module(f"{scope}.registry").DATASETS
        found = registry.get(dataset_type)
    metainfo = getattr(found, "METAINFO", None) or {}
    # An own data set may still have the attribute of mmdet 2.x.
    return ordered_names(last_named(metainfo) or getattr(found, "CLASSES", None) or ())

"""Read lists of class names in the forms that configs and checkpoints hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["last_named", "ordered_names"]


def last_named(metainfo: Mapping[str, Any]) -> Any:
    """Value of ``classes`` or ``CLASSES``; of both the later one, as mmdet's ``init_detector`` lowers all keys.

    A data set of today that is given ``CLASSES`` records its own ``classes`` first, then the user's ``CLASSES``.
    """
    named = [value for key, value in metainfo.items() if str(key).lower() == "classes" and value is not None]
    return named[-1] if named else None


def ordered_names(named: Any) -> tuple[str, ...]:
    """Class names by label, from a list or a dictionary, by label (``{0: 'cat'}``) or of labels (``{'cat': 0}``).

    Raises:
        ValueError: another form; the message describes it.
    """
    if isinstance(named, Mapping):
        return _from_mapping(named)
    if isinstance(named, str | bytes) or not hasattr(named, "__iter__"):
        raise ValueError(f"{named!r} is no list of names")
    if isinstance(named, set | frozenset):
        raise ValueError("a set of names has no order, so that no name belongs to a label; write a list")
    names = tuple(named)
    if odd := [name for name in names if isinstance(name, bool) or not isinstance(name, str | int)]:
        raise ValueError(f"{odd[0]!r} is no name")
    return tuple(str(name) for name in names)


def _from_mapping(named: Mapping[Any, Any]) -> tuple[str, ...]:
    labels = {label: value for key, value in named.items() if (label := _label(key)) is not None}
    if len(labels) == len(named):  # label → name
        if sorted(labels) != list(range(len(named))):
            raise ValueError(f"its labels are not 0 to {len(named) - 1}")
        return ordered_names([labels[label] for label in range(len(named))])
    positions = [_label(value) for value in named.values()]
    if positions != list(range(len(named))):
        raise ValueError("a dictionary of classes must be {0: 'cat', 1: 'dog'} or {'cat': 0, 'dog': 1}")
    return ordered_names(list(named))


def _label(value: Any) -> int | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, str) and value.isascii() and value.isdigit():  # JSON has no other keys
        return int(value)
    return value if isinstance(value, int) else None

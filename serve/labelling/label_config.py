"""Label Studio's labelling configuration: which controls take boxes, masks and polygons, on which image."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal
from xml.etree import ElementTree

from serve.errors import BadRequest, quote

__all__ = ["Control", "check_labels", "read_label_config"]

Kind = Literal["rectanglelabels", "brushlabels", "polygonlabels"]

MAX_CONFIG_CHARS = 256 * 1024
MAX_LISTED = 20
_KINDS: Mapping[str, Kind] = {
    "RectangleLabels": "rectanglelabels",
    "BrushLabels": "brushlabels",
    "PolygonLabels": "polygonlabels",
}
_VARIABLE = re.compile(r"\$(\w+)")


@dataclass(frozen=True)
class Control:
    """A control of the configuration that takes objects.

    Attributes:
        kind: what it takes; the type of its results.
        from_name: its name.
        to_name: name of the image.
        data_key: entry of a task's data that has the image.
        labels: its label for each class name: the label itself, and every alias in ``predicted_values``.
    """

    kind: Kind
    from_name: str
    to_name: str
    data_key: str
    labels: Mapping[str, str]


def read_label_config(text: object) -> Sequence[Control]:
    """Read a configuration.

    Raises:
        BadRequest: it is none, has no control for boxes, masks or polygons on an image, or none of these has a label.
    """
    if not isinstance(text, str) or len(text) > MAX_CONFIG_CHARS:
        raise BadRequest(f"the label config must be XML of at most {MAX_CONFIG_CHARS} characters")
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise BadRequest("the label config must have no DOCTYPE and no entities")
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise BadRequest(f"the label config is not XML: {error}") from None
    images = {
        image.get("name", ""): found[1]
        for image in root.iter("Image")
        if (found := _VARIABLE.fullmatch(image.get("value", "")))
    }
    controls = []
    for tag, kind in _KINDS.items():
        for element in root.iter(tag):
            to_name = element.get("toName", "")
            if to_name in images:
                controls.append(
                    Control(kind, element.get("name", ""), to_name, images[to_name], _labels(element))
                )
    if not controls:
        raise BadRequest(
            f"the label config has none of {', '.join(_KINDS)} on an Image whose value is a variable such as "
            f"{quote('$image')}"
        )
    if not any(control.labels for control in controls):
        names = ", ".join(quote(control.from_name) for control in controls)
        raise BadRequest(
            f'no Label is in {names} of the label config; add one for each class, such as <Label value="Car"/> (labels '
            "that a task brings are not read)"
        )
    return controls


def check_labels(controls: Sequence[Control], classes: Sequence[str], model: str) -> None:
    """Check that at least one class of a model has a label.

    Raises:
        BadRequest: none has, so that every prediction would be empty.
    """
    labels = {name: None for control in controls for name in control.labels}
    if classes and labels.keys().isdisjoint(classes):
        raise BadRequest(
            f"no Label of the label config is a class of {model}: the labels are {_listed(labels)}, the classes "
            f'{_listed(classes)}; rename a label, or add predicted_values="CLASS" to it'
        )


def _listed(names: Iterable[str]) -> str:
    first = list(itertools.islice(names, MAX_LISTED + 1))
    shown = ", ".join(quote(name) for name in first[:MAX_LISTED])
    return f"{shown}, …" if len(first) > MAX_LISTED else shown


def _labels(element: ElementTree.Element) -> Mapping[str, str]:
    labels: dict[str, str] = {}
    for each in element.iter("Label"):
        value = each.get("value", "")
        for name in (value, *each.get("predicted_values", "").split(",")):
            labels.setdefault(name.strip(), value)
    labels.pop("", None)
    return labels

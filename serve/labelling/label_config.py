"""Label Studio's labelling configuration: which controls take boxes, masks and polygons, on which image."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal
from xml.etree import ElementTree

from serve.errors import BadRequest, quote

__all__ = ["Control", "read_label_config"]

Kind = Literal["rectanglelabels", "brushlabels", "polygonlabels"]

MAX_CONFIG_CHARS = 256 * 1024
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
        BadRequest: it is none, or has no control for boxes, masks or polygons on an image.
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
    return controls


def _labels(element: ElementTree.Element) -> Mapping[str, str]:
    labels: dict[str, str] = {}
    for each in element.iter("Label"):
        value = each.get("value", "")
        for name in (value, *each.get("predicted_values", "").split(",")):
            labels.setdefault(name.strip(), value)
    labels.pop("", None)
    return labels

"""Label Studio's labelling configuration: which controls take boxes, masks and polygons, on which image."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from xml.etree import ElementTree

from serve.errors import BadRequest, quote

__all__ = ["Control", "ImageTag", "check_labels", "read_label_config"]

Kind = Literal["rectanglelabels", "brushlabels", "polygonlabels"]

MAX_CONFIG_CHARS = 256 * 1024
MAX_LISTED = 20
_KINDS: Mapping[str, Kind] = {
    "RectangleLabels": "rectanglelabels",
    "BrushLabels": "brushlabels",
    "PolygonLabels": "polygonlabels",
}
# A variable in the value of a tag: a path into the task's data, such as $image, $views.front or $pages[0].
_VARIABLE = re.compile(r"\$([\w.\[\]]+)")


@dataclass(frozen=True)
class ImageTag:
    """An ``Image`` of the configuration.

    Attributes:
        name: its name.
        value: where a task's data has it: a variable, or a text with variables in it.
        is_list: the variable is a list of images (``valueList``), whose regions have an ``item_index``.
    """

    name: str
    value: str
    is_list: bool = False

    def find(self, data: Mapping[str, Any]) -> list[Any]:
        """Return the image that a task's data names, or its images if they are a list; empty without any."""
        found = self._resolve(data)
        if self.is_list:
            return list(found) if isinstance(found, list) else []
        return [] if found is None or found == "" else [found]

    def _resolve(self, data: Mapping[str, Any]) -> Any:
        if whole := _VARIABLE.fullmatch(self.value):
            return _look_up(data, whole[1])
        found = [_look_up(data, path) for path in _VARIABLE.findall(self.value)]
        if any(each is None for each in found):
            return None
        texts = iter(map(str, found))
        return _VARIABLE.sub(lambda match: next(texts), self.value)


@dataclass(frozen=True)
class Control:
    """A control of the configuration that takes objects.

    Attributes:
        kind: what it takes; the type of its results.
        from_name: its name.
        image: the image that it is for.
        labels: its label for each class name, as results have it: by the label itself, its alias, and every name in
            ``predicted_values``.
    """

    kind: Kind
    from_name: str
    image: ImageTag
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
        image.get("name", ""): ImageTag(image.get("name", ""), value, is_list)
        for image in root.iter("Image")
        # Label Studio takes the list where an image has both.
        for is_list, value in ((False, image.get("value", "")), (True, image.get("valueList", "")))
        if _VARIABLE.search(value)
    }
    controls = [
        Control(kind, element.get("name", ""), images[name], _labels(element))
        for tag, kind in _KINDS.items()
        for element in root.iter(tag)
        for name in element.get("toName", "").split(",")
        if name in images
    ]
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
    """Read the labels of a control: what Label Studio stores for each, by the names of classes that it stands for.

    Source: HumanSignal/label-studio, ``web/libs/editor/src/mixins/SelectedModel.js``: results have a label's alias
    where there is one.
    """
    labels: dict[str, str] = {}
    tags = [each for each in element.iter("Label") if each.get("value")]
    stored = [each.get("alias") or each.attrib["value"] for each in tags]
    # A label's own names go before what another one takes over.
    for attribute in ("value", "alias", "predicted_values"):
        for each, label in zip(tags, stored, strict=True):
            given = each.get(attribute, "")
            for name in given.split(",") if attribute == "predicted_values" else (given,):
                labels.setdefault(name.strip(), label)
    labels.pop("", None)
    return labels


def _look_up(data: Any, path: str) -> Any:
    """Follow a path such as ``views.front`` or ``pages[0]``; None where it leads nowhere."""
    if isinstance(data, dict) and path in data:
        return data[path]
    for step in path.replace("[", ".").replace("]", "").split("."):
        if isinstance(data, list) and step.isdecimal() and int(step) < len(data):
            data = data[int(step)]
        elif isinstance(data, dict):
            data = data.get(step)
        else:
            return None
    return data

"""Drawing primitives for images: smooth lines, text, panels, non-overlapping labels, class colours.

Images are BGR uint8 arrays. Text uses fonts that ship with packages, so that images look the same on every machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from serve.visualize.fonts import Line, draw_lines, line_width

__all__ = [
    "Area",
    "BgrImage",
    "Colour",
    "Text",
    "class_colour",
    "draw_line",
    "draw_panel",
    "draw_polygon",
    "draw_texts",
    "place_label",
    "text_size",
]

BgrImage = NDArray[np.uint8]
Colour = tuple[int, int, int]  #: BGR
Area = tuple[float, float, float, float]  #: left, top, right, bottom in pixels

_FRACTION_BITS = 4  # of OpenCV's fixed-point coordinates
_PANEL: Colour = (30, 22, 16)
#: One colour per class, by label, distinguishable on a dark background and in photographs (BGR).
_CLASS_COLOURS: tuple[Colour, ...] = (
    (67, 159, 255), (150, 92, 255), (110, 226, 124), (255, 196, 86), (64, 220, 250), (255, 140, 190),
    (86, 110, 255), (190, 226, 60), (214, 160, 255), (150, 206, 250), (120, 190, 170), (230, 230, 230),
)  # fmt: skip


class Text(NamedTuple):
    """One line of text at its top left corner, in pixels of the finished image."""

    at: tuple[float, float]
    words: str
    size: int
    colour: Colour
    chip: bool = False


def place_label(
    outline: NDArray[np.float64],
    words: str,
    size: tuple[int, int],
    taken: list[Area],
    type_size: int = 13,
    *,
    spare: Sequence[Area] = (),
    tight: bool = False,
) -> tuple[float, float] | None:
    """Find a free position for a label next to an outline.

    Args:
        outline: (K, 2) column, row of the labelled shape.
        words: the label, which gets a margin of four pixels.
        size: width and height of the image.
        taken: occupied areas; the found one is added.
        type_size: font size in pixels.
        spare: areas to avoid if possible.
        tight: prefer the upper edge of the outline, as in photographs.

    Returns:
        The upper left corner, or None without a free position.
    """
    width, height = (side + 8 for side in text_size(words, type_size))
    (x1, y1), (x2, y2) = outline.min(0), outline.max(0)
    gap = 0 if tight else 6
    middle = (y1 + y2 - height) / 2
    places = [(x2 + gap, middle), (x1 - gap - width, middle), ((x1 + x2 - width) / 2, y1 - gap - height)]
    places += [((x1 + x2 - width) / 2, y2 + gap), (x2 + gap, y1 - height), (x1 - gap - width, y2)]
    if tight:  # in images: on the upper edge, else inside it, else below
        places = [(x1 - 1, y1 - height), (x1, y1), (x1 - 1, y2), (x2 - width, y1), (x2 - width, y1 - height)]
        places += [(x1 - 1, y1 - 2 * height - 2), (x2 - width, y1 - 2 * height - 2)]
    areas = [(x, y, x + width, y + height) for x, y in places]
    areas = [a for a in areas if min(a) >= 0 and a[2] <= size[0] and a[3] <= size[1]]
    free = [area for area in areas if not _covers(area, taken)]
    best = next((area for area in free if not _covers(area, spare)), free[0] if free else None)
    if best is None:
        return None
    taken.append(best)
    return best[:2]


def _covers(area: Area, others: Sequence[Area]) -> bool:
    x1, y1, x2, y2 = area
    return any(x1 < right and left < x2 and y1 < low and top < y2 for left, top, right, low in others)


def draw_texts(image: BgrImage, texts: Sequence[Text]) -> None:
    """Draw all texts in place; a chip is a dark background under a text."""
    for text in texts:
        if text.chip:
            width, height = (side + 8 for side in text_size(text.words, text.size))
            draw_panel(image, (*text.at, text.at[0] + width, text.at[1] + height), 0.78)
    lines = []
    for text in texts:
        inset = 4 if text.chip else 0
        at = (round(text.at[0] + inset), round(text.at[1] + inset))
        lines.append(Line(at, text.words, text.size, text.colour))
    draw_lines(image, lines)


def text_size(words: str, size: int) -> tuple[float, float]:
    """Width and height of a line of text in pixels; all lines of one font size are equally high."""
    return line_width(words, size), float(size)


def draw_panel(image: BgrImage, area: Area, cover: float = 0.86) -> None:
    """Darken a rectangle."""
    x1, y1, x2, y2 = (max(0, round(value)) for value in area)
    part = image[y1:y2, x1:x2]
    part[:] = (part * (1 - cover) + np.array(_PANEL) * cover).astype(np.uint8)


def class_colour(label: int) -> Colour:
    """Choose the colour of a class: one of twelve, by label modulo 12."""
    return _CLASS_COLOURS[int(label) % len(_CLASS_COLOURS)]


def _fixed(points: Any) -> NDArray[np.int32]:
    """Convert pixel coordinates to OpenCV's fixed point."""
    limited = np.clip(np.asarray(points, np.float64), -(2.0**20), 2.0**20)
    return np.asarray(np.round(limited * 2**_FRACTION_BITS), np.int32)


def draw_line(canvas: BgrImage, ends: Any, colour: Colour, thickness: int) -> None:
    """Draw a smooth line through (K, 2) column, row; fractions of a pixel count."""
    cv2.polylines(canvas, [_fixed(ends)], False, colour, thickness, cv2.LINE_AA, _FRACTION_BITS)


def draw_polygon(
    canvas: BgrImage, corners: Any, colour: Colour, thickness: int = 1, *, fill: bool = False
) -> None:
    """Draw a smooth closed outline, or fill it; (K, 2) column, row, where fractions of a pixel count."""
    if fill:
        cv2.fillPoly(canvas, [_fixed(corners)], colour, cv2.LINE_AA, _FRACTION_BITS)
    else:
        cv2.polylines(canvas, [_fixed(corners)], True, colour, thickness, cv2.LINE_AA, _FRACTION_BITS)

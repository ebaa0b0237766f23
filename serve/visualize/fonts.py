r"""Fonts for text in any script: Pillow's own, DejaVu Sans (in matplotlib's wheel), WenQuanYi Micro Hei (in OpenCV's).

A text is drawn with the first font that has all of its characters. DejaVu Sans shapes Arabic and writes it from right
to left if matplotlib is installed and Pillow has Raqm; OpenCV's font adds Chinese, Japanese and Korean. Characters that
no font has are written as escapes (``\u0e23``), so that nothing disappears.
"""

from __future__ import annotations

import importlib.util
import threading
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, features

__all__ = ["Line", "draw_lines", "line_width"]

Face = Literal["default", "dejavu", "opencv"]
_FACES: tuple[Face, ...] = ("default", "dejavu", "opencv")
_PROBE_PX = 24
_NO_CHARACTER = "\U0010ffff"
# OpenCV's fonts keep decoded glyphs; the gateway draws in several threads.
_OPENCV = threading.Lock()


class Line(NamedTuple):
    """A line of text: its upper left corner and font size in pixels, its colour as BGR."""

    at: tuple[int, int]
    words: str
    size: int
    colour: tuple[int, int, int]


def draw_lines(image: NDArray[np.uint8], lines: Sequence[Line]) -> None:
    """Draw lines of text into a BGR image, in place."""
    page = Image.fromarray(np.ascontiguousarray(image[..., ::-1]))
    pen = ImageDraw.Draw(page)
    others = []
    for line in lines:
        face, words = _typeset(line.words)
        if face == "opencv":
            others.append((line, words))
        else:
            pen.text(line.at, words, fill=line.colour[::-1], font=_pillow_font(face, line.size), anchor="la")
    drawn = np.ascontiguousarray(np.asarray(page)[..., ::-1])
    with _OPENCV:
        for line, words in others:
            baseline = (line.at[0], line.at[1] + line.size)
            cv2.putText(drawn, words, baseline, line.colour, _opencv_font(), line.size)
    image[:] = drawn


def line_width(words: str, size: int) -> float:
    """Return the width of a line of text in pixels."""
    face, words = _typeset(words)
    if face != "opencv":
        return float(_pillow_font(face, size).getlength(words))
    with _OPENCV:
        return float(cv2.getTextSize((0, 0), words, (0, 0), _opencv_font(), size)[2])


@lru_cache(maxsize=1024)
def _typeset(words: str) -> tuple[Face, str]:
    """Return the face for a text, and the text with escapes for characters that the face lacks."""
    missing = {face: sum(not _has(face, character) for character in words) for face in _FACES}
    best = min(_FACES, key=lambda face: missing[face])  # the first of equals
    if not missing[best]:
        return best, words
    escaped = (
        character if _has(best, character) else character.encode("unicode_escape").decode("ascii")
        for character in words
    )
    return best, "".join(escaped)


@lru_cache(maxsize=8192)
def _has(face: Face, character: str) -> bool:
    if character == " ":
        return True
    if not character.isprintable() or (face == "dejavu" and _dejavu_path() is None):
        return False
    is_leftward = unicodedata.bidirectional(character) in ("R", "AL", "AN")
    if is_leftward and (face != "dejavu" or not features.check("raqm")):
        return False
    if face == "opencv":
        return character == "?" or not np.array_equal(_probe(character), _probe("?"))
    font = _pillow_font(face, _PROBE_PX)
    glyph, no_glyph = font.getmask(character), font.getmask(_NO_CHARACTER)
    return glyph.size != no_glyph.size or bytes(glyph) != bytes(no_glyph)


def _probe(character: str) -> NDArray[np.uint8]:
    canvas = np.zeros((2 * _PROBE_PX, 2 * _PROBE_PX, 3), np.uint8)
    with _OPENCV:
        cv2.putText(canvas, character, (4, _PROBE_PX + 8), (255, 255, 255), _opencv_font(), _PROBE_PX)
    return canvas


@lru_cache(maxsize=32)
def _pillow_font(face: Face, size: int) -> Any:
    path = _dejavu_path() if face == "dejavu" else None
    return ImageFont.load_default(size) if path is None else ImageFont.truetype(str(path), size)


@lru_cache(maxsize=1)
def _dejavu_path() -> Path | None:
    """Find the font in matplotlib's folder without importing it; None without matplotlib."""
    spec = importlib.util.find_spec("matplotlib")
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(spec.submodule_search_locations[0], "mpl-data", "fonts", "ttf", "DejaVuSans.ttf")
    return path if path.is_file() else None


@lru_cache(maxsize=1)
def _opencv_font() -> Any:
    return cv2.FontFace("uni")

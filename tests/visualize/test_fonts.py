"""Class names of any script are drawn, and characters without a glyph are written as escapes."""

from __future__ import annotations

import numpy as np
import pytest

from serve.visualize import fonts
from serve.visualize.fonts import Line, draw_lines, line_width

NAMES = {
    "Chinese": "汽车",
    "Japanese": "歩行者",
    "Korean": "자동차",
    "Cyrillic": "грузовик",
    "Greek": "όχημα",
    "Arabic": "سيارة",
    "Hebrew": "אוטו",
    "German": "Fußgänger",
    "English": "Pedestrian",
}


@pytest.fixture
def no_matplotlib(monkeypatch):
    """Act as a gateway's installation, which has no matplotlib."""

    def forget() -> None:
        for cached in (fonts._typeset, fonts._has, fonts._pillow_font):
            cached.cache_clear()

    forget()
    monkeypatch.setattr(fonts, "_dejavu_path", lambda: None)
    yield
    monkeypatch.undo()
    forget()


def drawn(words: str, size: int = 24) -> np.ndarray:
    image = np.zeros((48, 420, 3), np.uint8)
    draw_lines(image, [Line((4, 6), words, size, (10, 200, 250))])
    return image


@pytest.mark.parametrize("name", NAMES)
def test_every_character_of_a_name_has_a_glyph_of_its_own(name):
    words = NAMES[name]
    assert fonts._typeset(words)[1] == words
    image = drawn(words)
    columns = np.flatnonzero(image.any(axis=(0, 2)))
    assert len(columns) and columns[-1] <= 4 + line_width(words, 24) + 2
    assert tuple(image.reshape(-1, 3).max(0)) == pytest.approx((10, 200, 250), abs=3)
    for character in set(words):
        other = "a" if character != "a" else "b"
        assert not np.array_equal(image, drawn(words.replace(character, other)))


def test_arabic_is_shaped_and_written_from_the_right():
    both = drawn("سيارة")
    apart = line_width("س", 24) + line_width("ي", 24) + line_width("ا", 24) + line_width("ر", 24)
    assert line_width("سيارة", 24) < apart + line_width("ة", 24)  # joined letters are narrower
    last_alone = np.flatnonzero(drawn("ة").any(axis=(0, 2)))
    first = np.flatnonzero(both.any(axis=(0, 2)))
    assert first[0] == pytest.approx(last_alone[0], abs=3)  # the last letter is the leftmost


@pytest.mark.parametrize(
    ("words", "written"),
    [("รถ", r"\u0e23\u0e16"), ("bus 🚗", r"bus \U0001f697"), ("a\tb", r"a\tb"), ("", "")],
)
def test_characters_without_a_glyph_are_escaped(words, written):
    assert fonts._typeset(words)[1] == written
    assert np.array_equal(drawn(words), drawn(written))


@pytest.mark.parametrize("name", NAMES)
def test_without_matplotlib_only_leftward_scripts_are_escaped(no_matplotlib, name):
    words = NAMES[name]
    is_escaped = fonts._typeset(words)[1] != words
    assert is_escaped == (name in ("Arabic", "Hebrew"))
    assert drawn(words).any()

"""Files of results: one for each frame, on any file system, whatever the frames are called."""

from __future__ import annotations

import itertools
import random
import unicodedata

import pytest

from serve.predict.stems import caseless, hashed, stems_of

FORMS = [unicodedata.normalize(form, "é") for form in ("NFC", "NFD")]
LISTS = [
    ("a.bin", "a.pcd"),
    ("a.bin", "a.pcd", "a.bin.pcd"),
    ("a.bin", "a.pcd", "a.bin.pcd", "a.bin.bin", "a.bin.pcd.bin"),
    ("A.bin", "a.bin"),
    ("A.bin", "a.bin", "A.pcd", "a.pcd"),
    ("A/1.bin", "a/1.bin", "a/2.bin"),
    tuple(f"{form}.bin" for form in FORMS),
    tuple(f"{form}.{suffix}" for form in (*FORMS, "É") for suffix in ("bin", "pcd")),
    ("strasse.bin", "straße.bin", "STRASSE.bin"),
    ("a.bin", "a.txt/1.bin"),
    ("a.bin", "a.bin.TXT/1.bin", "a.pcd"),
    ("A.bin", "a.bin", f"{hashed('A.bin')}.bin", hashed("a.bin").upper()),
    ("a", "a.b", "a.b.c", "a.c"),
    ("x" * 250 + ".bin", "x" * 250 + ".pcd", "x" * 251 + ".bin", "x" * 252 + ".bin", "é" * 125 + ".bin"),
    ("v1.2", "v1.3", "v1.2.1"),
]


def clash(stems: list[str]) -> bool:
    """Whether files or folders of results meet on a file system without case and normal forms."""
    files = [caseless(f"{stem}.txt") for stem in stems]
    folders = {
        caseless("/".join(parts[:k]))
        for parts in (stem.split("/") for stem in stems)
        for k in range(1, len(parts))
    }
    return len(set(files)) < len(files) or bool(folders & set(files))


@pytest.mark.parametrize("names", LISTS, ids=" ".join)
def test_no_two_frames_have_the_same_file_in_any_order(names: tuple[str, ...]) -> None:
    found = dict(zip(names, stems_of(names), strict=True))
    assert not clash(list(found.values()))
    assert all(len(f"{stem.rpartition('/')[2]}.json".encode()) <= 255 for stem in found.values())
    for order in itertools.islice(itertools.permutations(names), 30):
        assert dict(zip(order, stems_of(order), strict=True)) == found


def test_names_made_of_few_letters_never_meet() -> None:
    rng = random.Random(3)
    for _ in range(300):
        pieces = ("a", "A", ".bin", ".pcd", ".txt", "/", FORMS[0], FORMS[1])
        names = {"".join(rng.choices(pieces, k=rng.randint(1, 6))) for _ in range(30)}
        chosen = sorted(
            name for name in names if all(part not in ("", ".", "..") for part in name.split("/"))
        )
        folders = {caseless(name[: name.rindex("/")]) for name in chosen if "/" in name}
        frames = [name for name in chosen if caseless(name) not in folders]
        assert not clash(stems_of(frames)), frames


def test_stems_that_nothing_shares_are_the_names_without_suffix() -> None:
    names = ["000008.bin", "n008__LIDAR_TOP__1533151603547590.pcd.bin", "drive/000009.bin", "ü.bin"]
    assert stems_of(names) == ["000008", "n008__LIDAR_TOP__1533151603547590.pcd", "drive/000009", "ü"]
    assert stems_of(["a.bin", "a.pcd", "b.bin"]) == ["a.bin", "a.pcd", "b"]

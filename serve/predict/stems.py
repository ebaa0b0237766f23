"""Stems of frames: what the files that are made of a frame are called, less their suffix; each frame has its own.

    000008.bin                         000008
    a.bin, a.pcd                       a.bin, a.pcd: two would be called `a`
    A.bin, a.bin; a.bin.pcd beside     A.bin~0f1e2d3c4b5a6978: as above, with a hash of the frame's name
    the first two

Two stems differ even on a file system that takes capitals for small letters, or one normal form of Unicode for another,
so that files of frames can be copied to any. They depend on the names of the frames alone, not on their order.
"""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from array import array
from collections.abc import Iterator, Sequence

import numpy as np

__all__ = ["Stems", "bare", "caseless", "hashed", "longer", "repeated", "stem_for", "stems_of"]

_HASH = (1 << 64) - 1
_HASHED = re.compile(r"~[0-9a-f]{16}$", re.IGNORECASE)
_MOST_BYTES = 255 - len(".json")  # of a file's name, less the longest suffix of a result
# A frame in a folder of such a name has it for a folder of results, beside the results of other frames.
_RESULT_SUFFIXES = (".txt", ".json", ".jpg", ".png")


def bare(name: str) -> str:
    """Return the name of a file without its suffix."""
    return os.path.splitext(name)[0]


def caseless(name: str) -> str:
    """Return what names have in common that a file system may take for one name.

    That is Unicode's canonical caseless match (definition 145 of The Unicode Standard, section 3.13).
    """
    if name.isascii():
        return name.lower()
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", name).casefold())


def hashed(name: str, identity: str | None = None) -> str:
    """Lengthen a name by a hash, so that it is no other's; a name too long for a file's is cut.

    Args:
        name: the name.
        identity: what the hash is of; `name` if None.
    """
    digest = hashlib.sha256(os.fsencode(name if identity is None else identity)).hexdigest()[:16]
    folder, slash, last = name.rpartition("/")
    kept = last.encode(errors="surrogateescape")[: _MOST_BYTES - 1 - len(digest)]
    return f"{folder}{slash}{kept.decode(errors='ignore')}~{digest}"


def stem_for(name: str, stem: str | None = None) -> str:
    """Return the stem that a frame has if it shares it with no other.

    Args:
        name: of the frame.
        stem: one of its own, as a manifest gives it.
    """
    return _own(name, stem or bare(name))


def longer(name: str) -> str:
    """Return the stem of a frame that shares the one of `stem_for`, if it shares this one with no other."""
    return _own(name, name)


def _own(name: str, stem: str) -> str:
    is_long = len(stem.rpartition("/")[2].encode(errors="surrogateescape")) > _MOST_BYTES
    return hashed(name) if is_long or _HASHED.search(stem) else stem


class Stems:
    """Chooses the stems of frames that are listed up to twice; 8 bytes of memory for each frame meanwhile.

    Every frame is counted, and all of them once more unless `settle` is true; then `stem` knows.
    """

    def __init__(self) -> None:
        self._found = array("Q")
        self._folders: set[int] = set()
        self._shared: frozenset[int] | None = None
        self._lost: frozenset[int] = frozenset()

    def count(self, name: str, stem: str | None = None) -> None:
        """Count a frame, by its name and the stem of its own, if it has one."""
        self._found.append(_hash(self.stem(name, stem)))
        if self._shared is None and "/" in name:
            self._folders.update(_hash(bare(folder)) for folder in _folders(name))

    def settle(self) -> bool:
        """End a count of all frames; false if they have to be counted again."""
        found, self._found = self._found, array("Q")
        doubtful = repeated(found) | {folder for folder in self._folders if folder in found}
        if self._shared is None:
            self._shared = doubtful
            return not doubtful
        self._lost = doubtful
        return True

    def stem(self, name: str, stem: str | None = None) -> str:
        """Return the stem of a frame, as far as it is known."""
        chosen = stem_for(name, stem)
        if self._shared and _hash(chosen) in self._shared:
            chosen = longer(name)
        return hashed(name) if self._lost and _hash(chosen) in self._lost else chosen


def stems_of(names: Sequence[str], *, are_folders: bool = False) -> list[str]:
    """Return the stems of frames in memory; folders have no suffix."""
    stems, is_settled = Stems(), False
    owned = [(name, name if are_folders else None) for name in names]
    while not is_settled:
        for each in owned:
            stems.count(*each)
        is_settled = stems.settle()
    return [stems.stem(*each) for each in owned]


def repeated(hashes: array[int]) -> frozenset[int]:
    """Return what is in an array of unsigned 64-bit numbers more than once."""
    values, counts = np.unique(np.frombuffer(hashes, np.uint64), return_counts=True)
    return frozenset(values[counts > 1].tolist())


def _hash(stem: str) -> int:
    return hash(caseless(stem)) & _HASH


def _folders(name: str) -> Iterator[str]:
    """Yield the folders of a name that are called as files of results are."""
    at = name.find("/")
    while at >= 0:
        if name[:at].lower().endswith(_RESULT_SUFFIXES):
            yield name[:at]
        at = name.find("/", at + 1)

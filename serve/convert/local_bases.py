"""Stand-ins for bases that a config names by a path which is not there.

A config copied out of a checkout of mmdet 2.x still says ``../_base_/models/faster_rcnn_r50_fpn.py``. If that file is
missing, the installed zoo's base of the same words is taken.
"""

from __future__ import annotations

import ast
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from serve import zoo
from serve.zoo.config_bases import config_bases

__all__ = ["local_bases"]


@contextmanager
def local_bases(path: Path) -> Iterator[Path]:
    """Yield a path that mmengine can read: `path` itself, or a copy beside stand-ins for its missing bases.

    Nothing is replaced if a base is neither there nor in the zoo: mmengine's own message names it.
    """
    bases = _bases(path)
    missing = [base for base in bases if "::" not in base and not (path.parent / base).is_file()]
    found = {base: _in_zoo(base) for base in missing}
    if not missing or not all(found.values()):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="mmdet3d-serve-config-") as scratch:
        # As deep as the bases climb.
        depth = max(base.count("../") for base in bases)
        folder = Path(scratch, *(["x"] * (depth + 1)))
        folder.mkdir(parents=True)
        for base in bases:
            if "::" in base:
                continue
            target = found.get(base) or (path.parent / base).resolve()
            stand_in = Path(os.path.normpath(folder / base))
            stand_in.parent.mkdir(parents=True, exist_ok=True)
            stand_in.write_text(f"_base_ = {str(target)!r}\n", encoding="utf-8")
        copy = folder / path.name
        copy.write_bytes(path.read_bytes())
        yield copy


def _bases(path: Path) -> list[str]:
    """Bases in ``_base_ = …``; none if the file is no Python or computes them (mmengine says so)."""
    try:
        return [base for base in config_bases(ast.parse(path.read_bytes())) if isinstance(base, str)]
    except (OSError, SyntaxError, ValueError):
        return []


def _in_zoo(base: str) -> Path | None:
    """Find the zoo's file of the same folder and words: faster_rcnn is faster-rcnn today."""
    wanted = _words(Path(base))
    for root in zoo.installed_roots().values():
        for candidate in sorted((root / "configs").glob("*/*.py")) + sorted(
            (root / "configs").glob("_base_/*/*.py")
        ):
            if _words(candidate) == wanted:
                return candidate
    return None


def _words(path: Path) -> tuple[str, tuple[str, ...]]:
    """Folder, and the words of the name in any order: hv_pointpillars_… became pointpillars_hv_…, 01voxel voxel01."""
    folder = path.parent.name if path.parent.name not in ("", "..") else "_base_"
    words = re.split(r"[-_]", path.stem.lower())
    return folder, tuple(sorted("".join(sorted(word)) for word in words))

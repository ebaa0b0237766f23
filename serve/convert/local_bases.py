"""Bases of a config, before it is run: those that cannot be are refused, those of the old layout replaced.

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

import yaml

from serve import zoo
from serve.errors import ArchiveError
from serve.zoo.config_bases import config_bases

__all__ = ["check_bases", "local_bases"]


def check_bases(path: Path) -> None:
    """Follow the bases that a config names in its text, through the files beside it.

    Raises:
        ArchiveError: a config is its own base, or a base is of a package that mmengine has no configs of.
    """
    _follow(path, ())


def _follow(path: Path, children: tuple[Path, ...]) -> None:
    from mmengine.config.utils import MODULE2PACKAGE

    own = path.resolve()
    if own in children:
        chain = [each.name for each in (*children[children.index(own) :], own)]
        raise ArchiveError(
            f"config {children[0]} cannot be read: {chain[0]} is its own base ({' → '.join(chain)}); "
            "remove one of these from _base_"
        )
    try:
        bases = _bases(path)
    except TypeError as error:
        raise ArchiveError(f"config {path} cannot be read: {error}") from None
    for base in bases:
        package, is_named, _ = base.partition("::")
        if not is_named:
            _follow(path.parent / base, (*children, own))
        elif package not in MODULE2PACKAGE:
            raise ArchiveError(
                f"config {path} has the base {base}, but {package} is no package of OpenMMLab; those served are "
                "mmdet and mmdet3d, as in mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py"
            )


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
    """Bases in ``_base_ = …``; none if the file cannot be read or computes them (mmengine says so)."""
    try:
        if path.suffix in (".json", ".yaml", ".yml"):
            found = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML
            named = found.get("_base_") if isinstance(found, dict) else None
            bases = named if isinstance(named, list) else [named]
        else:
            bases = list(config_bases(ast.parse(path.read_bytes())))
    except (OSError, SyntaxError, ValueError, yaml.YAMLError):
        return []
    return [base for base in bases if isinstance(base, str)]


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

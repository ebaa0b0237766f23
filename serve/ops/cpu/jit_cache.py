"""Where the machine code of our CPU kernels is kept between processes.

Beside the source (in its ``__pycache__``) where that can be written, so that what set-up compiled is there for
all; else in a folder of this user, which starts as a copy of it; else nowhere, and every process compiles for
itself. numba alone would ignore machine code that it may read but not write (`numba.core.caching`), which is
what an image with a read-only root file system holds.

A folder is named after a module and a digest of its source and of all it imports here: numba looks only at the file
a kernel is in, and would go on using code compiled with another version of a function from another file.
Machine code is unpickled, so only folders that nobody else can write are taken. Knows nothing of the kernels.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import stat
import tempfile
from functools import cache
from pathlib import Path

__all__ = ["choose_folder", "fallback", "folder"]

SOURCES = Path(__file__).resolve().parents[1]
IMPORT = re.compile(r"^ *from serve\.ops\.?([\w.]*) import \(?([\w,\s]*)", re.MULTILINE)
# Set by `serve.ops.install`, before the first kernel is imported.
fallback: Path | None = None


@cache
def folder(module: str) -> Path | None:
    """The folder of one module's kernels in this process, or None where there is none; decided once."""
    places = [fallback] if fallback is not None else []
    with contextlib.suppress(OSError):  # no temporary folder, or none that is ours alone
        places.append(_own_temporary_folder())
    return choose_folder(module, SOURCES / "__pycache__", places)


def choose_folder(module: str, own: Path, places: list[Path]) -> Path | None:
    """A folder for the present sources in `own`, else in the first of `places` that can be used, else None.

    Args:
        module: path below `serve.ops`, such as ``boxes.nms``.
        own: beside the sources; what lies there is trusted as the sources are.
        places: folders to make one in, begun as a copy of the one in `own`.
    """
    name = f"kernels-{module}-{_digest(module)}"
    if _writable(own / name):
        for former in own.glob(f"kernels-{module}-*"):
            if former.name != name:
                shutil.rmtree(former, ignore_errors=True)
        return own / name
    for place in places:
        try:
            made = place.expanduser() / name
            made.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            if not made.exists():
                _begin(made, own / name)
        except (OSError, RuntimeError):  # RuntimeError: there is no home to expand ~ to
            continue
        if _private(made) and _writable(made):
            return made
    return None


def _digest(module: str) -> str:
    """Of the module and, through their imports, all modules here that it rests on."""
    digest = hashlib.sha256()
    seen, ahead = set(), [module]
    while ahead:
        name = ahead.pop()
        source = SOURCES / f"{name.replace('.', '/')}.py"
        if name in seen or not source.exists():
            continue
        seen.add(name)
        text = source.read_text(encoding="utf-8")
        digest.update(f"{name}\0{text}\0".encode())
        for inner, names in IMPORT.findall(text):
            package = f"{inner}." if inner else ""
            ahead += [inner, *(package + word.strip() for word in names.split(","))]
    return digest.hexdigest()[:16]


def _own_temporary_folder() -> Path:
    """A folder in the system's temporary one that lasts; OSError where somebody else could write into it."""
    user = f"-{os.getuid()}" if hasattr(os, "getuid") else ""
    place = Path(tempfile.gettempdir()) / f"mmdet3d-serve{user}"
    place.mkdir(mode=0o700, exist_ok=True)
    if not _private(place):
        raise PermissionError(f"{place} belongs to somebody else, or others can write into it")
    return place


def _begin(made: Path, seed: Path) -> None:
    """Make the folder as a copy of `seed`, whole or not at all, also if two processes begin it at once."""
    with tempfile.TemporaryDirectory(dir=made.parent, prefix=".kernels-") as scratch:
        copy = Path(scratch) / "copy"
        if seed.is_dir():
            shutil.copytree(seed, copy, copy_function=shutil.copyfile)
        else:
            copy.mkdir()
        for one in (copy, *(path for path in copy.rglob("*") if path.is_dir())):
            os.chmod(one, 0o700)
        try:
            copy.rename(made)
        except OSError:
            if not made.is_dir():
                raise


def _writable(path: Path) -> bool:
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError:
        return False
    return True


def _private(path: Path) -> bool:
    """Whether only we (or root) can write into `path` itself."""
    found = path.lstat()
    others = stat.S_IWGRP | stat.S_IWOTH
    owners = {0, os.getuid()} if hasattr(os, "getuid") else {found.st_uid}
    return stat.S_ISDIR(found.st_mode) and found.st_uid in owners and not found.st_mode & others

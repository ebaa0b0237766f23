"""Folders for the machine code of the CPU kernels between processes.

The first choice in a checkout is the ``__pycache__`` beside the source, if it is writable, so that all users share the
code that set-up compiled (not beside a wheel that pip installed: it would stay when the wheel goes); then a folder of
this user, which starts as a copy of it; else none, and each process compiles for itself. numba alone ignores machine
code that is readable but not writable (`numba.core.caching`), as in an image with a read-only root file system.

A folder is named after a module and a digest of its source and of its imports below `serve.ops`: numba checks only the
file of the kernel, and would keep code compiled with an outdated function of another file. Machine code is unpickled,
so only folders that no other user can write to are used.
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

__all__ = ["choose_folder", "fallback", "folder", "possible_folders"]

SOURCES = Path(__file__).resolve().parents[1]
# The names are in parentheses, over several lines, or end with the line.
IMPORT = re.compile(r"^ *from serve\.ops\.?([\w.]*) import (?:\(([\w,\s]*)|([\w, ]*))", re.MULTILINE)
# Set by `serve.ops.install`, before the first kernel is imported.
fallback: Path | None = None


@cache
def folder(module: str) -> Path | None:
    """Return the folder of a module's kernels in this process, or None; chosen once."""
    places = [fallback] if fallback is not None else []
    with contextlib.suppress(OSError):  # no temporary folder, or not a private one
        places.append(_own_temporary_folder())
    from_wheel = any(SOURCES.parents[1].glob("mmdet3d_serve-*.dist-info"))
    return choose_folder(module, None if from_wheel else SOURCES / "__pycache__", places)


def possible_folders() -> list[Path]:
    """Return every folder in or beneath which machine code may be kept, whether or not it is writable."""
    found = [fallback] if fallback is not None else []
    with contextlib.suppress(OSError):
        found.append(_own_temporary_folder())
    return [*found, *SOURCES.rglob("__pycache__")]


def choose_folder(module: str, own: Path | None, places: list[Path]) -> Path | None:
    """Choose a folder for the present sources in `own`, else in the first usable one of `places`, else None.

    Args:
        module: path below `serve.ops`, such as ``boxes.nms``.
        own: folder beside the sources, trusted like them; None if nothing may be written there.
        places: parent folders for a copy of the one in `own`.
    """
    name = f"kernels-{module}-{_digest(module)}"
    if own is not None and _writable(own / name):
        for former in own.glob(f"kernels-{module}-*"):
            if former.name != name:
                shutil.rmtree(former, ignore_errors=True)
        return own / name
    for place in places:
        try:
            made = place.expanduser() / name
            made.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            if not made.exists():
                _begin(made, own and own / name)
        except (OSError, RuntimeError):  # RuntimeError: no home directory to expand ~
            continue
        if _private(made) and _writable(made):
            return made
    return None


def _digest(module: str) -> str:
    """Hash the sources of the module and, recursively, of its imports below `serve.ops`."""
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
        for inner, enclosed, listed in IMPORT.findall(text):
            package = f"{inner}." if inner else ""
            ahead += [
                inner,
                *(package + word.strip().partition(" ")[0] for word in (enclosed or listed).split(",")),
            ]
    return digest.hexdigest()[:16]


def _own_temporary_folder() -> Path:
    """Create a permanent folder in the system's temporary one; raise OSError if another user can write to it."""
    user = f"-{os.getuid()}" if hasattr(os, "getuid") else ""
    place = Path(tempfile.gettempdir()) / f"mmdet3d-serve{user}"
    place.mkdir(mode=0o700, exist_ok=True)
    if not _private(place):
        raise PermissionError(f"{place} belongs to another user, or others can write to it")
    return place


def _begin(made: Path, seed: Path | None) -> None:
    """Create the folder as a copy of `seed`, atomically, even if two processes do so at once."""
    with tempfile.TemporaryDirectory(dir=made.parent, prefix=".kernels-") as scratch:
        copy = Path(scratch) / "copy"
        if seed is not None and seed.is_dir():
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
    """Return whether only this user (or root) can write to `path` itself."""
    found = path.lstat()
    others = stat.S_IWGRP | stat.S_IWOTH
    owners = {0, os.getuid()} if hasattr(os, "getuid") else {found.st_uid}
    return stat.S_ISDIR(found.st_mode) and found.st_uid in owners and not found.st_mode & others

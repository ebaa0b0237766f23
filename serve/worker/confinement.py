"""Confinement of a worker by Landlock: it can write only where it must.

The audit hook of `serve.runtime.build_guard` sees what Python does. Libraries in C that write files (OpenCV, LMDB,
torch's own zip writer) raise no audit event. Landlock is Linux' access control that a thread puts upon itself and its
children for the rest of its life, without privileges (https://docs.kernel.org/userspace-api/landlock.html, also the
source of the numbers below). It covers the calling thread and those that it starts, so each thread that computes for a
model confines itself.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from collections.abc import Iterable
from pathlib import Path

__all__ = ["confine_writes"]

# System calls: the same numbers on all architectures since Linux 5.13.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_VERSION, _PATH_BENEATH = 1, 1
_PR_SET_NO_NEW_PRIVS = 38
# Access rights, bits of LANDLOCK_ACCESS_FS_*; truncation has been one of its own since version 3, and renaming into
# another folder, by which Triton files its code, since version 2: before, it is refused everywhere.
_WRITE_FILE, _MAKE_DIR, _MAKE_REG, _MAKE_SYM, _TRUNCATE = 1 << 1, 1 << 7, 1 << 8, 1 << 12, 1 << 14
_REFER, _REFER_SINCE = 1 << 13, 2
_TRUNCATE_SINCE = 3


def confine_writes(allowed: Iterable[Path]) -> bool:
    """Let this thread, and what it starts, create, write and truncate files only beneath `allowed`, for good.

    Sockets may be made, and files removed, as before. Files that are open stay so.

    Args:
        allowed: folders and files; those that do not exist are passed over.

    Returns:
        Whether it is in effect: not without Landlock in the kernel, or where a sandbox forbids its system calls.
    """
    if sys.platform != "linux":
        return False
    library = ctypes.CDLL(None, use_errno=True)
    version = library.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(_VERSION))
    if version < 1:
        return False
    rights = _WRITE_FILE | _MAKE_DIR | _MAKE_REG | _MAKE_SYM
    rights |= _REFER if version >= _REFER_SINCE else 0
    rights |= _TRUNCATE if version >= _TRUNCATE_SINCE else 0
    attributes = struct.pack("=Q", rights)
    ruleset = library.syscall(
        _CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint32(0)
    )
    if ruleset < 0:
        return False
    try:
        for path in allowed:
            _allow(library, ruleset, path, rights)
        if library.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
            return False
        return int(library.syscall(_RESTRICT_SELF, ruleset, ctypes.c_uint32(0))) == 0
    finally:
        os.close(ruleset)


def _allow(library: ctypes.CDLL, ruleset: int, path: Path, rights: int) -> None:
    try:
        opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if not path.is_dir():  # rights that name what a folder holds do not go with a file
            rights &= _WRITE_FILE | _TRUNCATE
        rule = struct.pack("=Qi", rights, opened)
        library.syscall(_ADD_RULE, ruleset, _PATH_BENEATH, rule, ctypes.c_uint32(0))
    finally:
        os.close(opened)

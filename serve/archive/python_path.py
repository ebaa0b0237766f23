"""Keep an unpacked archive's folder off Python's search path.

TorchServe starts a worker with the folder on ``PYTHONPATH``, so that ``golden`` and ``extra`` are packages that any
import by name finds. Only ``code/`` may be imported, and only if it is trusted (`serve.runtime.custom_code`).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from serve.errors import ArchiveError
from serve.settings.environment import filter_python_path

__all__ = ["keep_off_path"]


def keep_off_path(root: Path) -> None:
    """Remove an archive's folder, and all folders in it, from ``sys.path`` and from ``PYTHONPATH`` of child processes.

    Raises:
        ArchiveError: a module outside ``code/`` is imported already.
    """
    real = os.path.realpath(root)
    sys.path[:] = [place for place in sys.path if not _is_inside(place, real)]
    for place in list(sys.path_importer_cache):
        if _is_inside(place, real):
            del sys.path_importer_cache[place]
    filter_python_path(lambda place: not _is_inside(place, real))
    for name, module in list(sys.modules.items()):
        named = [str(place) for place in (getattr(module, "__file__", None), *_folders_of(module)) if place]
        # A module that was imported from a folder has its absolute path; torch.ops calls itself "_ops.py".
        places = [place for place in named if os.path.isabs(place)]
        inside = [place for place in places if _is_inside(place, real)]
        if not all(_is_inside(place, os.path.join(real, "code")) for place in inside):
            raise ArchiveError(
                f"the module {name} was imported from the archive in {root}; serve it by itself"
            )


def _folders_of(module: object) -> list[object]:
    try:
        return list(getattr(module, "__path__", None) or ())
    except Exception:  # a lazy module may raise anything
        return []


def _is_inside(place: str, real: str) -> bool:
    found = os.path.realpath(place)  # of an empty text, the present folder, as Python takes it
    return found == real or found.startswith(real + os.sep)

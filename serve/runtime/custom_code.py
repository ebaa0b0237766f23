"""Import the modules that a config names, from the archive or the environment, and say which one is missing."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from serve.archive import Archive
from serve.errors import ArchiveError
from serve.runtime.registry_guard import OPENMMLAB, allow_modules

__all__ = [
    "explain_missing",
    "import_archived_code",
    "import_modules",
    "imports_of",
    "names_foreign_modules",
]


def imports_of(config: Mapping[str, Any]) -> list[str]:
    """List the modules in ``custom_imports``."""
    imports = (config.get("custom_imports") or {}).get("imports") or []
    return [imports] if isinstance(imports, str) else [str(name) for name in imports]


def names_foreign_modules(config: Mapping[str, Any]) -> bool:
    """Whether ``custom_imports`` names other modules than OpenMMLab's, which only trusted archives may."""
    return any(name.partition(".")[0] not in OPENMMLAB for name in imports_of(config))


def import_archived_code(archive: Archive, config: Mapping[str, Any], *, trust_code: bool) -> None:
    """Import the modules in ``custom_imports``; other than OpenMMLab's only if `trust_code`.

    Raises:
        ArchiveError: the archive packs or names code that is not trusted, or a module cannot be imported.
    """
    if not trust_code:
        found = "packs code (custom_imports)" if archive.code is not None else None
        if found is None and names_foreign_modules(config):
            found = f"has modules imported by name (custom_imports: {', '.join(imports_of(config))[:200]})"
        if found is not None:
            raise ArchiveError(
                f"the archive {found}, which is not trusted; set MMDET3D_SERVE_TRUST_ARCHIVE_CODE=1 if you trust its "
                "author"
            )
    elif archive.code is not None:
        sys.path.insert(0, str(archive.code))
        importlib.invalidate_caches()
    import_modules(config, owner="the archive's code", trust=trust_code)


def import_modules(config: Mapping[str, Any], *, owner: str, trust: bool) -> None:
    """Import the modules in ``custom_imports`` as mmengine does, and let the config name their classes.

    Args:
        config: resolved config.
        owner: subject of the message about a module that is missing.
        trust: also allow classes and functions of these modules that no registry has.

    Raises:
        ArchiveError: a module cannot be imported; the message names the module or file that is missing.
    """
    names = imports_of(config)
    may_fail = bool((config.get("custom_imports") or {}).get("allow_failed_imports"))
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:  # a foreign module may raise anything at import
            if may_fail and isinstance(error, ImportError):
                continue
            reason = explain_missing(error, owner) or (
                f"the module {name} in custom_imports cannot be imported: {type(error).__name__}: {error}"
            )
            raise ArchiveError(reason) from error
    allow_modules({name.partition(".")[0] for name in names}, trusted=trust)


def explain_missing(error: BaseException, owner: str = "the archive's code") -> str | None:
    """Message that names the module or file whose absence is behind an error; None if another reason is."""
    for one in _chain(error):
        if isinstance(one, ModuleNotFoundError) and one.name:
            return (
                f"{owner} imports '{one.name}', which is neither packed nor installed; install it where the model is "
                "served, or put its folder on PYTHONPATH when you archive the model"
            )
        if isinstance(one, FileNotFoundError) and one.filename is not None:
            return (
                f"{owner} reads '{_printable(one.filename)}', which is not packed; put the file into the package, "
                "beside the code that reads it, and open it by a path relative to __file__"
            )
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Iterate over an error and the errors that caused it, the first cause first."""
    found: list[BaseException] = []
    one: BaseException | None = error
    while one is not None and one not in found:
        found.append(one)
        one = one.__cause__ or one.__context__
    return reversed(found)


def _printable(name: Any) -> str:
    text = name.decode(errors="replace") if isinstance(name, bytes) else str(name)
    # A path of the process that proves the archive tells a person less than the one below `code/`.
    parts = Path(text).parts
    return "/".join(parts[parts.index("code") :]) if "code" in parts else text

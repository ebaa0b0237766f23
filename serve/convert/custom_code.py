"""Find the user's own modules that a model needs, and collect them for the archive.

Needed are the modules in ``custom_imports``, the modules of classes that a lazy config names by path
(``mymodule.MyBackbone``), and, of each of these, what its source imports. A module of an installed package stays out:
the serving machine installs it. A package is packed whole, with the files beside its modules. A single-file module is
packed with the files beside it that its source names or that share its name.

Nothing is executed here except for parent packages, which Python imports to find a submodule.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.machinery import EXTENSION_SUFFIXES, ModuleSpec
from pathlib import Path
from typing import Any

from serve.archive.config_json import ObjectPath
from serve.archive.format import Source
from serve.errors import ArchiveError
from serve.runtime.custom_code import imports_of
from serve.runtime.registry_guard import OPENMMLAB, is_torch_layer_path, registries, registry_scopes

__all__ = ["PackedCode", "add_named_modules", "collect_custom_code", "names_unregistered"]

MAX_DATA_FILE_BYTES = 16 << 20
MAX_CODE_BYTES = 64 << 20
# Unless they are packages.
_SKIPPED_FOLDERS = frozenset({"__pycache__", "node_modules", "build", "dist", "work_dirs"})
_NAMED_IN_NOTE = 5


@dataclass
class PackedCode:
    """Files for ``code/`` of an archive.

    Attributes:
        files: by path below ``code/``.
        notes: what was left out, for the user.
    """

    files: dict[str, Source] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def add_named_modules(config: dict[str, Any]) -> None:
    """Add the modules of own classes that a config names by path to its ``custom_imports``; in place.

    Raises:
        ArchiveError: the model or its pipeline names a class of a module that is not found.
    """
    known = imports_of(config)
    found = [module for path in _type_paths(config) if (module := _module_of(path)) is not None]
    added = [name for name in dict.fromkeys(found) if name not in known]
    if added:
        config["custom_imports"] = {**(config.get("custom_imports") or {}), "imports": [*known, *added]}


def names_unregistered(config: Mapping[str, Any]) -> bool:
    """Whether the config names a class by path that no registry has, which only trusted code may."""
    from mmengine.utils import get_object_from_string

    known = {id(found) for one in registries() for found in one.module_dict.values()}
    paths = [path for path in _type_paths(config) if path.partition(".")[0] not in registry_scopes()]
    return any(id(get_object_from_string(path)) not in known for path in paths)


def _type_paths(part: Any) -> Iterator[str]:
    """Dotted values of ``type`` and paths of objects, except for OpenMMLab's and torch's own."""
    if isinstance(part, ObjectPath) and _is_own_path(part):
        yield str(part)
    elif isinstance(part, Mapping):
        kind = part.get("type")
        if isinstance(kind, str) and not isinstance(kind, ObjectPath) and _is_own_path(kind):
            yield kind
        for value in part.values():
            yield from _type_paths(value)
    elif isinstance(part, list | tuple):
        for value in part:
            yield from _type_paths(value)


def _is_own_path(kind: str) -> bool:
    """Whether a ``type`` is a dotted name outside of OpenMMLab's packages and torch."""
    words = kind.split(".")
    is_path = len(words) > 1 and all(word.isidentifier() for word in words)
    return is_path and words[0] not in OPENMMLAB and not is_torch_layer_path(kind)


def _module_of(path: str) -> str | None:
    """Find the longest part of a path that is a module; None for a class in the scope of a registry."""
    words = path.split(".")
    if words[0] in sys.stdlib_module_names:
        return None  # the registries refuse it
    for count in range(len(words) - 1, 0, -1):
        name = ".".join(words[:count])
        if _find(name) is not None:
            return name
    if words[0] in registry_scopes():
        return None
    raise ArchiveError(
        f"the config names {path}, but there is no module '{words[0]}'; put its folder on PYTHONPATH"
    )


def _find(name: str) -> ModuleSpec | None:
    try:
        return importlib.util.find_spec(name)
    except (ImportError, ValueError, AttributeError):
        return None


def collect_custom_code(config: Mapping[str, Any]) -> PackedCode:
    """Collect the modules in ``custom_imports`` that are not installed, and what they import.

    Raises:
        ArchiveError: a module is not found, two files would have the same place, or the code is too large.
    """
    may_fail = bool((config.get("custom_imports") or {}).get("allow_failed_imports"))
    collector = _Collector()
    for module in imports_of(config):
        if not collector.add_module(module) and not may_fail:
            raise ArchiveError(
                f"custom_imports names {module}, which cannot be imported; put it on PYTHONPATH"
            )
    return collector.finish()


class _Collector:
    def __init__(self) -> None:
        self._files: dict[str, Path] = {}
        self._seen: set[str] = set()
        self._compiled: list[str] = []
        self._large: list[str] = []
        self._installed = [
            Path(sysconfig.get_path(key)).resolve() for key in ("stdlib", "platstdlib", "purelib", "platlib")
        ]
        self._installed.append(
            Path(__file__).resolve().parents[1]
        )  # this package is where the model is served
        self._installed.append(Path(__file__).resolve().parents[2] / "handlers")

    def add_module(self, name: str) -> bool:
        """Pack the module's file or the package around it; returns whether there is such a module."""
        words = name.split(".")
        if words[0] in sys.stdlib_module_names or words[0] in OPENMMLAB:
            return True
        for count in range(1, len(words) + 1):
            unit = ".".join(words[:count])
            if unit in self._seen:
                return True
            spec = _find(unit)
            if spec is None:
                return count > 1  # a name in a module
            is_namespace = spec.submodule_search_locations is not None and not spec.has_location
            if is_namespace and count < len(words):
                continue  # a folder without __init__.py may hold any number of unrelated packages
            self._seen.add(unit)
            for location in spec.submodule_search_locations or ([spec.origin] if spec.origin else []):
                path = Path(location).resolve()
                if path.exists() and not any(path.is_relative_to(root) for root in self._installed):
                    self._add_unit(unit, path)
            return True
        return False

    def _add_unit(self, unit: str, path: Path) -> None:
        place = "/".join(unit.split("."))
        if path.is_dir():
            for file in _files_below(path):
                self._add_file(f"{place}/{file.relative_to(path).as_posix()}", file)
            for file in _files_below(path):
                if file.suffix == ".py":
                    inner = ".".join((unit, *file.relative_to(path).with_suffix("").parts))
                    self._follow(file, inner)
            return
        parent = place.rpartition("/")[0]
        self._add_file(
            f"{place}{path.suffix}" if path.suffix == ".py" else f"{parent}/{path.name}".lstrip("/"), path
        )
        if path.suffix == ".py":
            for file in _named_beside(path):
                beside = file.relative_to(path.parent).as_posix()
                self._add_file(f"{parent}/{beside}".lstrip("/"), file)
            self._follow(path, unit)

    def _add_file(self, place: str, file: Path) -> None:
        if file.name.endswith(tuple(EXTENSION_SUFFIXES)) or file.suffix in (".so", ".pyd", ".dll", ".dylib"):
            self._compiled.append(place)
            return
        if file.suffix != ".py" and file.stat().st_size > MAX_DATA_FILE_BYTES:
            self._large.append(f"{place} ({file.stat().st_size >> 20} MiB)")
            return
        former = self._files.setdefault(place, file)
        if former != file and former.read_bytes() != file.read_bytes():
            raise ArchiveError(
                f"{former} and {file} would both be packed as code/{place}; rename one, or make each module a package"
            )

    def _follow(self, file: Path, module: str) -> None:
        """Pack what a source imports; modules that are not found are left to the proof, for they may be optional."""
        for name in _imports_in(file, module):
            self.add_module(name)

    def finish(self) -> PackedCode:
        """Return the files, if they are not too large together."""
        sizes = {place: file.stat().st_size for place, file in self._files.items()}
        if sum(sizes.values()) > MAX_CODE_BYTES:
            largest = sorted(sizes, key=lambda place: -sizes[place])[:_NAMED_IN_NOTE]
            raise ArchiveError(
                f"the model's own code has {sum(sizes.values()) >> 20} MiB, more than {MAX_CODE_BYTES >> 20} MiB; its "
                f"largest files are {', '.join(f'{place} ({sizes[place] >> 20} MiB)' for place in largest)}; "
                "move what the model does not need out of its package"
            )
        notes = []
        if self._compiled:
            notes.append(
                f"not packed, because it is compiled for one machine: {_some(self._compiled)}; "
                "install the package where the model is served"
            )
        if self._large:
            notes.append(
                f"not packed, because it has more than {MAX_DATA_FILE_BYTES >> 20} MiB: {_some(self._large)}"
            )
        return PackedCode(dict(sorted(self._files.items())), tuple(notes))


def _some(names: list[str]) -> str:
    names = sorted(set(names))
    more = f" and {len(names) - _NAMED_IN_NOTE} more" if len(names) > _NAMED_IN_NOTE else ""
    return ", ".join(names[:_NAMED_IN_NOTE]) + more


def _files_below(root: Path) -> list[Path]:
    found = []
    visited: set[Path] = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        if (real := Path(folder).resolve()) in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(
            name
            for name in folders
            if (name not in _SKIPPED_FOLDERS or Path(folder, name, "__init__.py").is_file())
            and not name.startswith(".")
        )
        found += [
            Path(folder, name)
            for name in sorted(files)
            if not name.startswith(".")
            and not name.endswith((".pyc", ".pyo"))
            and Path(folder, name).is_file()
        ]
    return found


def _tree(file: Path) -> ast.AST:
    try:
        return ast.parse(file.read_bytes())
    except (SyntaxError, ValueError) as error:
        raise ArchiveError(f"{file} is no Python of this version: {error}") from None


def _imports_in(file: Path, module: str) -> list[str]:
    """Absolute names of the modules that a source imports, in statements or by ``import_module("…")``."""
    parts = module.split(".")  # of an __init__.py, the last is "__init__"
    names = []
    for node in ast.walk(_tree(file)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(parts[: -node.level]) if node.level else ""
            start = ".".join(part for part in (base, node.module or "") if part)
            names += [
                f"{start}.{alias.name}" if start else alias.name for alias in node.names if alias.name != "*"
            ]
            names += [start] if start else []
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            name = node.args[0].value
            if called in ("import_module", "__import__") and isinstance(name, str) and name[:1] != ".":
                names.append(name)
    return [name for name in dict.fromkeys(names) if name]


def _named_beside(module: Path) -> list[Path]:
    """List the data files beside a single-file module that share its name or that its source names."""
    folder = module.parent
    found = [file for file in folder.glob(f"{module.stem}.*") if file.suffix not in (".py", ".pyc")]
    for node in ast.walk(_tree(module)):
        text = node.value if isinstance(node, ast.Constant) else None
        if not isinstance(text, str) or not 0 < len(text) < 256 or "\n" in text or "\0" in text:
            continue
        if Path(text).is_absolute() or ".." in Path(text).parts or text.strip("./") == "":
            continue
        if "*" in text:
            found += [file for file in folder.glob(text) if text.strip("*/.")] if "**" not in text else []
        elif (folder / text).is_dir():
            found += _files_below(folder / text)
        elif (folder / text).is_file():
            found.append(folder / text)
    packed = (file for file in dict.fromkeys(found) if file.is_file() and file.suffix not in (".py", ".pyc"))
    return [file for file in packed if not file.name.startswith(".")]

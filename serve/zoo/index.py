"""Resolve a model name to its config, the URL of its weights and their hash.

The index is the one in the mmdet and mmdet3d wheels (``.mim/model-index.yml``, the metafiles it names and the configs
beside them), read without importing either package. Former names are recognised by rule, not by a list: the index's
weight URLs still carry them, and the renaming moved words, swapped ``BATCHxGPU`` for ``GPUxbBATCH`` and replaced a few
words (`serve.zoo.aliases`). If the index gives two URLs for one config, the URL whose file name agrees with the
config's name is used.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import importlib.util
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from serve.errors import ModelLookupError
from serve.storage.hashes import hash_in_name
from serve.zoo.aliases import ADDED_WORDS, ALIASES, bare_name, flat_name, name_words
from serve.zoo.config_bases import config_bases

__all__ = [
    "PACKAGES",
    "Zoo",
    "ZooEntry",
    "detect_package",
    "installed_roots",
    "list_models",
    "require_weights_url",
    "resolve",
]

PACKAGES = ("mmdet3d", "mmdet")

_HINTS_OF_3D = re.compile(
    r"\bmmdet3d\b|point_cloud_range|LoadPointsFromFile|Pack3DDetInputs|Det3DDataPreprocessor|Collect3D|voxel_layer"
)
_CONFIG_SUFFIXES = (".py", ".json", ".yaml", ".yml")
# As upstream's `init_detector` takes a config without a scope; what cannot be read is rejected by the conversion.
_USUAL_PACKAGE = "mmdet"
_BEFORE_COORDINATES = re.compile(r"/mmdetection3d/v0\.")
# Families with boxes in the LiDAR or depth frame; camera-frame boxes and segmentation did not change.
_LIDAR_FRAME_FAMILIES = frozenset(
    {
        *("3dssd", "dynamic_voxelization", "free_anchor", "groupfree3d", "h3dnet", "imvotenet", "mvxnet"),
        *("parta2", "pointpillars", "regnet", "second", "ssn", "votenet"),
    }
)
_OLD_COORDINATES = (
    "its weights were trained with mmdetection3d before 1.0.0rc0, which changed the LiDAR and depth box "
    "frames (size order and sense of yaw): KITTI anchor heads are converted, others are not"
)


@dataclass(frozen=True)
class ZooEntry:
    """One model: a config on disk and, where the index has them, published weights."""

    name: str
    """The config's file name without ``.py``."""
    package: str
    """``mmdet`` or ``mmdet3d``."""
    config_path: Path
    weights_url: str | None
    """URL of one ``.pth`` file, or None if none was published (or several, none of them the whole model)."""
    sha256_prefix: str | None
    """The 8 hex digits in the weights' file name; None if it has none."""
    aliases: tuple[str, ...] = ()
    """Short and former names of the model, sorted."""
    notes: tuple[str, ...] = ()
    """Remarks for the user."""


@dataclass
class _Index:
    """Models of one package, by name and by name key."""

    package: str
    entries: dict[str, ZooEntry] = field(default_factory=dict)
    by_key: dict[str | tuple[str, ...], set[str]] = field(default_factory=lambda: defaultdict(set))
    without_config: set[str] = field(default_factory=set)


class Zoo:
    """The models of one set of package folders.

    Args:
        roots: package name → the ``.mim`` folder inside it; the installed packages' if None.
    """

    def __init__(self, roots: Mapping[str, Path] | None = None) -> None:
        """See the class."""
        self._roots = dict(installed_roots() if roots is None else roots)
        self._indices: dict[str, _Index] = {}

    def resolve(self, model: str | os.PathLike[str], *, package: str | None = None) -> ZooEntry:
        """Find the one model that `model` names.

        Args:
            model: in this order of precedence, the path of an existing config; an alias (``second``); a zoo
                name; a former zoo name (``hv_second_secfpn_6x8_80e_kitti-3d-car``) or the name of a weight
                file. Names may have leading folders and a trailing ``.py`` (``configs/second/….py``), or
                mmengine's scope (``mmdet3d::…``).
            package: ``mmdet`` or ``mmdet3d`` to search one only.

        Raises:
            ModelLookupError: no model or more than one has that name.
        """
        asked = os.fspath(model).strip()
        if package is not None and package not in PACKAGES:
            raise ModelLookupError(
                f"package '{package}' has no model zoo; choose one of {', '.join(PACKAGES)}"
            )
        scope, _, rest = asked.rpartition("::")
        if scope in PACKAGES and package in (None, scope):
            asked, package = rest, scope
        path = Path(asked).expanduser()
        if path.suffix in _CONFIG_SUFFIXES and path.is_file():
            return self._resolve_file(path.resolve(), package)
        stem = bare_name(asked)
        found = self._find(stem, package)
        if len(found) > 1:
            found = self._narrow(found, Path(asked).parent.name)
        if not found:
            raise ModelLookupError(self._explain_unknown(asked, stem, package))
        if len(found) > 1:
            names = ", ".join(sorted(entry.name for entry in found))
            raise ModelLookupError(f"'{asked}' is ambiguous; use one of {names}")
        return found[0]

    def list_models(self, package: str | None = None, query: str | None = None) -> list[ZooEntry]:
        """Models, sorted by package and name.

        Args:
            package: restrict to this one.
            query: words, separated by spaces; restrict to models with every word in their name or aliases, whatever
                the case.
        """
        words = (query or "").lower().split()
        return [
            entry
            for each in self._load_indices(package)
            for _, entry in sorted(each.entries.items())
            if all(any(word in name.lower() for name in (entry.name, *entry.aliases)) for word in words)
        ]

    def _load_indices(self, package: str | None) -> list[_Index]:
        names = [name for name in PACKAGES if name in self._roots and package in (None, name)]
        for name in names:
            if name not in self._indices:
                self._indices[name] = _build_index(name, self._roots[name])
        return [self._indices[name] for name in names]

    def _find(self, stem: str, package: str | None) -> list[ZooEntry]:
        indices = self._load_indices(package)
        alias = ALIASES.get(stem.lower().replace("_", "-"))
        for name in filter(None, (alias, stem)):
            if exact := [each.entries[name] for each in indices if name in each.entries]:
                return exact
        loose = ("", *name_words(stem, without=ADDED_WORDS))
        for key in (flat_name(stem), name_words(stem), loose):
            if near := [each.entries[name] for each in indices for name in each.by_key.get(key, ())]:
                return near
        return []

    @staticmethod
    def _narrow(found: list[ZooEntry], folder: str) -> list[ZooEntry]:
        """Prefer the requested config folder, then entries with weights."""
        kept = [entry for entry in found if entry.config_path.parent.name == folder] or found
        return [entry for entry in kept if entry.weights_url] or kept

    def _resolve_file(self, path: Path, package: str | None) -> ZooEntry:
        for each in self._load_indices(package):
            entry = each.entries.get(path.stem)
            if entry and (entry.config_path.resolve() == path or _same_bytes(entry.config_path, path)):
                return replace(entry, config_path=path)
        found = package or detect_package(path) or _USUAL_PACKAGE
        note = f"{path.name} is not a config of the installed zoo, so it has no published weights"
        return ZooEntry(path.stem, found, path, None, None, (), (note,))

    def _explain_unknown(self, asked: str, stem: str, package: str | None) -> str:
        packages = package or "mmdet or mmdet3d"
        if not self._load_indices(package):
            return f"'{asked}' cannot be looked up: {packages} is not installed; run `make setup`"
        if asked.endswith(".py") and ("/" in asked or "\\" in asked):
            first = f"file {asked} does not exist, and {packages} has no config of that name"
        elif any(stem in each.without_config for each in self._load_indices(package)):
            first = f"'{asked}' is in the index of {packages}, but the installed wheel lacks its config"
        else:
            first = f"model '{asked}' not found in {packages}"
        close = self._suggest(stem, package)
        hint = f"; similar names: {', '.join(close)}" if close else ""
        return f"{first}{hint}; `mmdet3d-serve zoo` lists all names, and the path of a config works too"

    def _suggest(self, stem: str, package: str | None, limit: int = 5) -> list[str]:
        """Names similar to `stem`, best first."""
        names: dict[str, str] = {}
        for entry in self.list_models(package):
            for name in (entry.name, *entry.aliases):
                names.setdefault(flat_name(name), name if name in ALIASES else entry.name)
        flat = flat_name(stem)
        near = difflib.get_close_matches(flat, names, n=3 * limit, cutoff=0.6)
        near += sorted(key for key in names if len(flat) > 2 and flat in key)
        return list(dict.fromkeys(names[key] for key in near))[:limit]


@lru_cache(maxsize=1)
def _installed() -> Zoo:
    return Zoo()


def resolve(model: str | os.PathLike[str], *, package: str | None = None) -> ZooEntry:
    """`Zoo.resolve` over the installed packages (the index is read once per process)."""
    return _installed().resolve(model, package=package)


def list_models(package: str | None = None, query: str | None = None) -> list[ZooEntry]:
    """`Zoo.list_models` over the installed packages."""
    return _installed().list_models(package, query)


def require_weights_url(entry: ZooEntry) -> str:
    """URL of the model's published weights.

    Raises:
        ModelLookupError: none were published.
    """
    if entry.weights_url is None:
        raise ModelLookupError(
            f"no published weights for {entry.name} in the installed {entry.package}; train it, or pass your own "
            "checkpoint (--checkpoint FILE, or CHECKPOINT=FILE with make)"
        )
    return entry.weights_url


def installed_roots() -> dict[str, Path]:
    """Package name → the ``.mim`` folder inside it, for the installed packages."""
    roots: dict[str, Path] = {}
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        for folder in spec.submodule_search_locations or () if spec else ():
            if (root := Path(folder) / ".mim").is_dir():
                roots[package] = root
                break
    return roots


def _load_yaml(path: Path) -> Any:
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    with path.open(encoding="utf-8") as file:
        return yaml.load(file, loader)


def _read_metafiles(root: Path) -> Iterable[tuple[str, str, str | None]]:
    """(name, config path, URL of the weights) of every model in the metafiles."""
    index = root / "model-index.yml"
    if not index.is_file():
        return
    for metafile in (_load_yaml(index) or {}).get("Import", ()):
        content = _load_yaml(root / metafile) if (root / metafile).is_file() else None
        models = content.get("Models") if isinstance(content, dict) else content
        for model in models if isinstance(models, list) else ():
            if isinstance(model, dict) and isinstance(model.get("Name"), str):
                url = model.get("Weights")
                usable = isinstance(url, str) and urlsplit(url).path.endswith(".pth")
                config = str(model.get("Config") or model["Name"])
                yield bare_name(model["Name"]), config, url if usable else None


def _build_index(package: str, root: Path) -> _Index:
    configs = {
        path.stem: path
        for path in sorted((root / "configs").glob("*/**/*.py"))
        if "_base_" not in path.parts and not path.stem.startswith("_")
    }
    stems_by_words: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for stem in configs:
        stems_by_words[name_words(stem)].append(stem)

    index = _Index(package)
    candidates: dict[str, list[tuple[bool, bool, bool, str]]] = defaultdict(list)
    former: dict[str, set[str]] = defaultdict(set)
    for name, config, url in _read_metafiles(root):
        # The index sometimes names a folder or a spelling that the wheel lacks.
        alike = [] if Path(config).stem in configs else stems_by_words.get(name_words(config), [])
        stem = Path(config).stem if not alike else alike[0]
        if stem not in configs or len(alike) > 1:
            index.without_config.add(name)
            continue
        if name == stem or name not in configs:
            former[stem].add(name)
        if url is not None:
            disagrees = name_words(url) != name_words(stem)
            misplaced = not (root / config).is_file()
            candidates[stem].append((disagrees, misplaced, bool(_BEFORE_COORDINATES.search(url)), url))

    short: dict[str, list[str]] = defaultdict(list)
    for alias, target in ALIASES.items():
        short[target].append(alias)
    # URL → the config whose name its file name agrees with.
    owner = {each[-1]: stem for stem, urls in candidates.items() for each in urls if not each[0]}
    for stem, path in configs.items():
        urls = [each for each in candidates[stem] if owner.get(each[-1], stem) == stem]
        url = min(urls)[-1] if urls else None
        if url is not None:
            former[stem].add(bare_name(url))
        in_lidar_frame = path.parent.name in _LIDAR_FRAME_FAMILIES
        old = url is not None and _BEFORE_COORDINATES.search(url) and in_lidar_frame
        names = sorted({*former[stem], *short[stem]} - {stem})
        index.entries[stem] = ZooEntry(
            stem,
            package,
            path,
            url,
            hash_in_name(url) if url else None,
            tuple(names),
            (_OLD_COORDINATES,) if old else (),
        )
        for name in (stem, *former[stem]):
            index.by_key[flat_name(name)].add(stem)
            index.by_key[name_words(name)].add(stem)
            index.by_key[("", *name_words(name, without=ADDED_WORDS))].add(stem)
    return index


def _same_bytes(one: Path, other: Path) -> bool:
    return one.stat().st_size == other.stat().st_size and one.read_bytes() == other.read_bytes()


def detect_package(path: Path, *, depth: int = 8) -> str | None:
    """Find the package a config is written for, without running it.

    A ``default_scope`` decides, the file's before its bases'; then a base from one of the packages (``mmdet3d::…``,
    ``from mmdet3d.configs…``); then words that only 3D configs contain.

    Args:
        path: a Python config.
        depth: levels of bases to follow.

    Returns:
        ``mmdet3d``, ``mmdet``, or None if neither the file nor its bases show it.
    """
    scopes: list[str] = []
    hints: list[str] = []
    _read_scopes(path, depth, scopes, hints, set())
    return next(iter(scopes), None) or ("mmdet3d" if "mmdet3d" in hints else next(iter(hints), None))


def _read_scopes(path: Path, depth: int, scopes: list[str], hints: list[str], seen: set[Path]) -> None:
    path = path.resolve()
    if depth < 0 or path in seen or not path.is_file():
        return
    seen.add(path)
    try:
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
    except (OSError, UnicodeDecodeError, SyntaxError, ValueError):
        return
    bases: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and any(
            getattr(target, "id", "") == "default_scope" for target in node.targets
        ):
            constants = [leaf.value for leaf in ast.walk(node.value) if isinstance(leaf, ast.Constant)]
            scopes += [value for value in constants if value in PACKAGES]
        elif isinstance(node, ast.ImportFrom):
            hints += [package for package in PACKAGES if (node.module or "").split(".")[0] == package]
    if _HINTS_OF_3D.search(source):
        hints.append("mmdet3d")
    with contextlib.suppress(ValueError):  # a computed _base_ is left to mmengine
        bases += config_bases(tree)
    for base in bases:
        scope, _, rest = base.rpartition("::")
        if scope in PACKAGES:
            hints.append(scope)
        elif not scope:
            _read_scopes(path.parent / rest, depth - 1, scopes, hints, seen)

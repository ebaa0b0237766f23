"""Read a config: resolve its bases, keep what serving needs, import the modules that it names.

Reading a config runs its Python, as OpenMMLab does.
"""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from serve.archive.config_json import ObjectPath
from serve.convert.blame import blaming, describe
from serve.convert.custom_code import add_named_modules
from serve.convert.data_sets import drop_unused_objects, note_random_steps, unwrap_dataset
from serve.convert.legacy_config import is_legacy, modernize, package_of
from serve.convert.local_bases import check_bases, local_bases
from serve.errors import ArchiveError
from serve.runtime.custom_code import import_modules
from serve.runtime.pipeline import dataset_of

__all__ = ["FullConfig", "ResolvedConfig", "parse_config", "read_config", "reduce_config", "resolve_config"]

# Training, evaluation and logging keys stay outside the archive.
KEPT_KEYS = (
    "default_scope",
    "custom_imports",
    "model",
    "test_dataloader",
    "test_pipeline",
    "class_names",
    "metainfo",
    "point_cloud_range",
    "input_modality",
)


class ResolvedConfig(NamedTuple):
    """A config after its bases, in today's form.

    Attributes:
        config: what serving needs, as plain data.
        package: the package it is written for.
        notes: what was converted or left out.
    """

    config: dict[str, Any]
    package: Literal["mmdet", "mmdet3d"]
    notes: tuple[str, ...] = ()


class FullConfig(NamedTuple):
    """A config with its bases and everything in it.

    Attributes:
        full: plain data; converted to today's form if the config is an old one.
        notes: what was converted.
    """

    full: dict[str, Any]
    notes: tuple[str, ...] = ()


def resolve_config(path: Path) -> ResolvedConfig:
    """Read a config and keep what serving needs, as plain data, with the package it is written for.

    Configs of mmdet 2.x and mmdet3d 0.x are converted (`serve.convert.legacy_config`).

    Runs the config's Python and imports its custom modules.

    Raises:
        ArchiveError: missing, unreadable, or not for mmdet or mmdet3d.
    """
    return reduce_config(read_config(path), path)


def read_config(path: Path) -> FullConfig:
    """Read a config with its bases by mmengine; an old one is converted.

    Raises:
        ArchiveError: missing, unreadable, or without a model.
    """
    from serve.runtime.model import suppress_warnings

    full = parse_config(path)
    if not isinstance(full.get("model"), Mapping):
        raise ArchiveError(f"config {path} describes no model")
    notes: tuple[str, ...] = ()
    with suppress_warnings(), blaming(f"config {path}"):
        package = package_of(full)
        if is_legacy(full):
            full, notes = modernize(full, package)
        else:
            full["default_scope"] = package
    return FullConfig(full, notes)


def parse_config(path: Path) -> dict[str, Any]:
    """Read a config with its bases by mmengine, whatever it describes, as plain data.

    Raises:
        ArchiveError: missing or unreadable.
    """
    from serve import ops
    from serve.runtime.model import suppress_warnings

    ops.install()
    if not path.is_file():
        raise ArchiveError(f"config {path} does not exist; check the path")
    check_bases(path)
    with suppress_warnings():
        from mmengine.config import Config
        from mmengine.config.utils import ConfigParsingError

        from serve.storage import backends  # noqa: F401  (registers s3:// and packed files with mmengine)

        try:
            with local_bases(path) as whole:
                parsed = Config.fromfile(str(whole), import_custom_modules=False)
                return {
                    key: _as_data(value, key, build=key in KEPT_KEYS)
                    for key, value in parsed._to_lazy_dict().items()
                }
        except RecursionError as error:
            raise ArchiveError(
                f"config {path} cannot be read: it, or one of its bases, is its own base, or its values are nested "
                "too deep"
            ) from error
        except (Exception, SystemExit) as error:  # a config is a program
            shown = str(error) if isinstance(error, ConfigParsingError | SyntaxError) else describe(error)
            shown = _explain_lazy_call(error) or shown
            if "U+FEFF" in shown:
                shown += "; it starts with a byte order mark: save it as UTF-8 without one"
            raise ArchiveError(f"config {path} cannot be read: {shown}") from error


def _explain_lazy_call(error: BaseException) -> str | None:
    """Explain mmengine's error without words for a call in a pure-Python config; None for other errors."""
    frames = traceback.extract_tb(error.__traceback__)
    if not isinstance(error, RuntimeError) or str(error) or not frames[-1].filename.endswith("lazy.py"):
        return None
    return (
        f"line {frames[-2].lineno} calls what the config imports; in a config that starts with imports mmengine takes "
        "them for names of classes and functions only; write the value itself, or put _base_ = [] first"
    )


def reduce_config(whole: FullConfig, path: Path) -> ResolvedConfig:
    """Keep what serving needs of a config, and import its custom modules.

    Args:
        whole: from `read_config`; not changed.
        path: where it comes from.

    Raises:
        ArchiveError: not for mmdet or mmdet3d, or a module is missing.
    """
    with blaming(f"config {path}"):
        return _reduce(whole, path)


def _reduce(whole: FullConfig, path: Path) -> ResolvedConfig:
    from serve.runtime.model import scope_of, strip_pretrained, suppress_warnings

    full, notes = whole
    full = {**full, "model": dict(full["model"])}
    notes += unwrap_augmented(full)
    scope = scope_of(full)
    if scope not in ("mmdet", "mmdet3d"):
        raise ArchiveError(f"config {path} is for {scope}; supported: mmdet, mmdet3d")
    _inline_teacher(full["model"], path)
    kept = {key: full[key] for key in KEPT_KEYS if full.get(key) is not None}
    kept["default_scope"] = scope
    config: dict[str, Any] = strip_pretrained(kept)
    notes += unwrap_dataset(config)
    drop_unused_objects(config)
    notes += keep_one_view(config)
    notes += note_random_steps(config["test_dataloader"]["dataset"]["pipeline"])
    _check_imports(config)
    with suppress_warnings():
        add_named_modules(config)
        import_modules(config, owner=f"config {path}", trust=True)
    return ResolvedConfig(config, "mmdet3d" if scope == "mmdet3d" else "mmdet", notes)


def _check_imports(config: Mapping[str, Any]) -> None:
    """Check the form of ``custom_imports``, which mmengine takes as arguments of a function."""
    given = config.get("custom_imports") or {}
    names = given.get("imports") if isinstance(given, Mapping) else given
    listed = [names] if isinstance(names, str) else names or []
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in listed):
        raise ArchiveError(f"custom_imports must be dict(imports=['my_module']), got {str(given)[:80]}")
    if relative := [name for name in listed if name.startswith(".")]:
        raise ArchiveError(
            f"custom_imports names {relative[0]}, which is relative; write the whole name of the module"
        )


def _inline_teacher(model: dict[str, Any], path: Path) -> None:
    """Replace the path of a distilled student's teacher config, relative to upstream's root, by its content."""
    from mmengine.config import Config

    named = model.get("teacher_config")
    if not isinstance(named, str):
        return
    for root in (Path(), *path.resolve().parents):
        if (root / named).is_file():
            model["teacher_config"] = {"model": Config.fromfile(str(root / named)).to_dict()["model"]}
            return
    raise ArchiveError(f"config {path} names a teacher config {named}, which does not exist")


def unwrap_augmented(config: dict[str, Any]) -> tuple[str, ...]:
    """Replace a wrapper that averages over test-time augmentations by the model in it; in place.

    Upstream's ``test.py --tta`` dumps such a config.

    Returns:
        A note, if there was one.
    """
    kind, inner = str(config["model"].get("type", "")).rpartition(".")[2], config["model"].get("module")
    if not kind.endswith("TTAModel") or not isinstance(inner, Mapping):
        return ()
    config["model"] = dict(inner)
    return (f"test-time augmentation ({kind}) is left out: the model that it wraps is served",)


def keep_one_view(config: dict[str, Any]) -> tuple[str, ...]:
    """Replace test-time augmentation in the test pipeline by its first scale without a flip; in place.

    Returns:
        A note, if there was any.
    """
    dataset = dataset_of(config)
    steps: list[Any] = []
    augmented = False
    for step in dataset["pipeline"]:
        if str(step.get("type", "")).rpartition(".")[2] != "TestTimeAug":
            steps.append(step)
            continue
        augmented = True
        for variants in step.get("transforms", ()):
            kept = min(variants, key=lambda one: float(one.get("prob") or 0.0), default=None)
            if kept is not None and not str(kept["type"]).rpartition(".")[2].startswith("RandomFlip"):
                steps.append(variants[0])
    if not augmented:
        return ()
    dataset["pipeline"] = steps
    return ("test-time augmentation (TestTimeAug) is left out: one scale, no flip",)


def _as_data(value: Any, key: str = "", *, build: bool = True) -> Any:
    """Replace objects of Python in a config by what names them: classes and functions, constants, paths of files.

    Args:
        value: a value of the config; imports of a "lazy" config are mmengine's stand-ins.
        key: name of its member; a ``type`` becomes text.
        build: import what a stand-in stands for; else it becomes text, so that serving needs no package of training.
    """
    from mmengine.config.lazy import LazyAttr, LazyObject

    if isinstance(value, Mapping):
        return {name: _as_data(inner, str(name), build=build) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        made = [_as_data(inner, build=build) for inner in value]
        return tuple(made) if isinstance(value, tuple) else made
    if isinstance(value, LazyAttr | LazyObject):
        path = f"{value.module}.{value}"
        if key == "type" or not build:
            return path
        found = value.build()
        is_named = isinstance(found, type) or callable(found)
        return ObjectPath(_path_of(found) or path) if is_named else _as_data(found, key)
    if isinstance(value, Path):
        return str(value)
    if (isinstance(value, type) or callable(value)) and (named := _path_of(value)):
        return named if key == "type" else ObjectPath(named)
    return value


def _path_of(value: Any) -> str | None:
    """Path by which mmengine finds a class or function; None for one that has none, such as a lambda."""
    from mmengine.utils import get_object_from_string

    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", "")
    if not isinstance(module, str) or not name or "<" in name:
        return None
    # mmcv.ops.nms is a module and a function: only the shorter path finds the function.
    for place in (module, module.rpartition(".")[0]):
        if place and get_object_from_string(f"{place}.{name}") is value:
            return f"{place}.{name}"
    return None

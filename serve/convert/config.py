"""Read a config: resolve its bases, keep what serving needs, find its classes and its custom code.

Reading a config runs its Python, as OpenMMLab does.
"""

from __future__ import annotations

import importlib
import importlib.util
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from serve.archive.format import Source
from serve.errors import ArchiveError

__all__ = ["collect_custom_code", "configured_classes", "resolve_config"]

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


def resolve_config(path: Path) -> tuple[dict[str, Any], Literal["mmdet", "mmdet3d"]]:
    """Read a config and keep what serving needs, as plain data, with the package it is written for.

    Runs the config's Python and imports its custom modules.

    Raises:
        ArchiveError: missing, unreadable, or not for mmdet or mmdet3d.
    """
    from serve import ops
    from serve.runtime.model import scope_of, strip_pretrained, suppress_warnings

    ops.install()
    if not path.is_file():
        raise ArchiveError(f"config {path} does not exist; check the path")
    with suppress_warnings():
        from mmengine.config import Config

        from serve.storage import backends  # noqa: F401  (registers s3:// and packed files with mmengine)

        try:
            full = Config.fromfile(str(path), import_custom_modules=False).to_dict()
        except Exception as error:
            raise ArchiveError(f"config {path} cannot be read: {error}") from error
    if "model" not in full:
        raise ArchiveError(f"config {path} describes no model")
    scope = scope_of(full)
    if scope not in ("mmdet", "mmdet3d"):
        raise ArchiveError(f"config {path} is for {scope}; supported: mmdet, mmdet3d")
    _inline_teacher(full["model"], path)
    kept = {key: full[key] for key in KEPT_KEYS if full.get(key) is not None}
    kept["default_scope"] = scope
    config: dict[str, Any] = strip_pretrained(kept)
    if config.get("custom_imports"):
        with suppress_warnings():
            from mmengine.utils import import_modules_from_strings

            import_modules_from_strings(**dict(config["custom_imports"]))
    return config, "mmdet3d" if scope == "mmdet3d" else "mmdet"


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


def configured_classes(config: Mapping[str, Any]) -> Sequence[str]:
    """Class names from a resolved config's metainfo or from its data set class; empty if neither has any."""
    dataset = (config.get("test_dataloader") or {}).get("dataset") or {}
    while "pipeline" not in dataset and isinstance(dataset.get("dataset"), Mapping):
        dataset = dataset["dataset"]
    for source in (dataset.get("metainfo"), config.get("metainfo"), {"classes": config.get("class_names")}):
        if source and (classes := source.get("classes") or source.get("CLASSES")):
            return tuple(classes)
    return _read_dataset_classes(dataset.get("type"), str(config["default_scope"]))


def _read_dataset_classes(dataset_type: Any, scope: str) -> Sequence[str]:
    """METAINFO of the data set class; building the data set would read its annotations."""
    from serve.runtime.model import suppress_warnings

    if not dataset_type:
        return ()
    with suppress_warnings():
        registry = importlib.import_module(f"{scope}.registry").DATASETS
        found = registry.get(dataset_type)
    metainfo = getattr(found, "METAINFO", None) or {}
    return tuple(metainfo.get("classes") or ())


def collect_custom_code(config: Mapping[str, Any]) -> dict[str, Source]:
    """Collect the sources of modules in ``custom_imports`` that are not installed, by path below ``code/``.

    Raises:
        ArchiveError: a module cannot be imported.
    """
    imports = (config.get("custom_imports") or {}).get("imports") or []
    code: dict[str, Source] = {}
    installed = [Path(sysconfig.get_path(key)).resolve() for key in ("stdlib", "purelib", "platlib")]
    for module in [imports] if isinstance(imports, str) else imports:
        top = module.partition(".")[0]
        spec = importlib.util.find_spec(top)
        if spec is None:
            raise ArchiveError(
                f"custom_imports names {module}, which cannot be imported; put it on PYTHONPATH"
            )
        for location in spec.submodule_search_locations or ([spec.origin] if spec.origin else []):
            path = Path(location).resolve()
            if any(path.is_relative_to(root) for root in installed):
                continue  # the serving machine installs the package
            if path.is_file():
                code[path.name] = path
            else:
                files = sorted(path.rglob("*.py"))
                code.update({f"{top}/{file.relative_to(path).as_posix()}": file for file in files})
    return code

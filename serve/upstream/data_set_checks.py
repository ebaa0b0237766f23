"""Checks of a config's data sets: missing files and annotations, other classes."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from serve.errors import DataSetError
from serve.storage import is_remote

__all__ = [
    "categories_checked",
    "check_annotations",
    "check_classes",
    "check_files",
    "check_tables",
    "classes_of",
    "leaf_datasets",
    "shorten",
]

# Heads of detectors whose number of classes is that of the data set.
_HEADS = ("bbox_head", "pts_bbox_head")
# Metrics that read the tables of a release, and upstream's version of it.
_TABLES = {"NuScenesMetric": "v1.0-trainval", "LyftMetric": "v1.01-train"}
_MOST_NAMED = 5


def leaf_datasets(dataset: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the data sets inside wrappers such as RepeatDataset and ConcatDataset."""
    inner = dataset.get("dataset") or dataset.get("datasets")
    if inner is None:
        yield dataset
    for one in [inner] if isinstance(inner, Mapping) else inner or ():
        yield from leaf_datasets(one)


def check_files(dataset: Mapping[str, Any], where: str) -> None:
    """Check that the annotations and at least one folder of a data set exist; remote ones are left to the loader.

    Args:
        dataset: in the form of a config.
        where: its place in the config, for the message.

    Raises:
        DataSetError: they do not.
    """
    if _is_elsewhere(dataset):
        return
    root = str(dataset.get("data_root") or "")
    if root and not _exists(root):
        raise DataSetError(
            f"the data set's folder {root} does not exist; put or link the data there, or name another with "
            f"--cfg-options {where}.data_root=FOLDER"
        )
    file = dataset.get("ann_file")
    if isinstance(file, str) and file and not _exists(path := _join(root, file)):
        there = _list_folder(Path(path).parent)
        raise DataSetError(
            f"the annotations {path} do not exist ({there}); create them, or name others with --cfg-options "
            f"{where}.ann_file=FILE"
        )
    folders = [
        _join(root, str(folder))
        for folder in (dataset.get("data_prefix") or {}).values()
        if isinstance(folder, str) and folder
    ]
    if folders and not any(map(_exists, folders)):
        raise DataSetError(
            f"the data set has another layout: there is no {folders[0]} ({_list_folder(Path(root or '.'))}); move the "
            f"files, or name their folder with --cfg-options {where}.data_prefix"
        )


def check_annotations(metric: Mapping[str, Any], where: str) -> None:
    """Check that the annotations of a metric exist; remote ones are left to the metric.

    Args:
        metric: in the form of a config.
        where: its place in the config, for the message.

    Raises:
        DataSetError: they do not.
    """
    file = metric.get("ann_file")
    if isinstance(file, str) and _kind(metric) == "LyftMetric":  # which joins them itself
        file = _join(str(metric.get("data_root") or ""), file)
    if isinstance(file, str) and not metric.get("backend_args") and not _exists(file):
        raise DataSetError(
            f"{where}.ann_file {file} does not exist; set it with --cfg-options {where}.ann_file=FILE"
        )
    folder = metric.get("seg_prefix")
    if _kind(metric) == "CityScapesMetric" and isinstance(folder, str) and not _exists(folder):
        raise DataSetError(
            f"{where}.seg_prefix {folder} does not exist; set it with --cfg-options {where}.seg_prefix=FOLDER"
        )


def check_tables(metric: Mapping[str, Any], dataset: Mapping[str, Any], where: str) -> None:
    """Check that the tables of a release exist that a metric reads its truth from.

    Args:
        metric: in the form of a config; others than nuScenes' and Lyft's have no tables.
        dataset: in the form of a config; its ``metainfo.version`` names the release.
        where: place of the metric in the config, for the message.

    Raises:
        DataSetError: they do not.
    """
    if _kind(metric) not in _TABLES:
        return
    root = str(metric.get("data_root") or "")
    version = (dataset.get("metainfo") or {}).get("version", _TABLES[_kind(metric)])
    folder = Path(root, version, version) if _kind(metric) == "LyftMetric" else Path(root, version)
    if not _exists(str(folder)):
        there = _list_folder(Path(root or "."))
        raise DataSetError(
            f"the tables {folder} that {_kind(metric)} reads do not exist ({there}); name their folder with "
            f"--cfg-options {where}.data_root=FOLDER, and another release with metainfo = dict(version=…) of the data "
            "set in the config"
        )


def check_classes(dataset: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    """Check that the heads of a detector have as many classes as the data set.

    Raises:
        DataSetError: they have not.
    """
    classes = classes_of(dataset)
    if classes is None or any("language" in name for name in model):
        return
    for name, count in _counts(model):
        if count != len(classes):
            raise DataSetError(
                f"the model's {name}.num_classes is {count}, the data set {dataset.get('type')} has {len(classes)} "
                f"classes ({shorten(classes)}); make them the same in the config: metainfo = dict(classes=…)"
            )


@contextmanager
def categories_checked() -> Iterator[None]:
    """Check that COCO annotations have all classes: upstream shifts the labels of those behind a missing one."""
    from mmdet.datasets import CocoDataset

    load = CocoDataset.load_data_list

    def load_data_list(self: Any) -> Any:
        opened: list[Any] = []

        def open_annotations(path: str) -> Any:
            opened.append(type(self).COCOAPI(path))
            return opened[-1]

        self.COCOAPI = open_annotations  # of this object, which forgets the annotations once they are read
        try:
            found = load(self)
        finally:
            del self.COCOAPI
        classes = self.metainfo["classes"]
        if len(self.cat_ids) < len(classes):
            raise DataSetError(
                f"the annotations {self.ann_file} have categories for {len(self.cat_ids)} of the {len(classes)} "
                f"classes ({shorten(classes)}); name theirs with metainfo = dict(classes=…) in the config"
            )
        ordered = tuple(opened[-1].cats[number]["name"] for number in self.cat_ids)
        if ordered != tuple(classes):
            print(
                f"warning: {self.ann_file} lists its categories as {shorten(ordered)}, and upstream gives labels in "
                f"that order, but metainfo has the classes {shorten(classes)}: names would be mixed up; list them "
                "as the annotations do",
                file=sys.stderr,
            )
        return found

    CocoDataset.load_data_list = load_data_list
    try:
        yield
    finally:
        CocoDataset.load_data_list = load


def classes_of(dataset: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """Return the classes that a data set's config or type names; None if neither does."""
    from mmengine.registry import DATASETS

    metainfo = dataset.get("metainfo") or {}
    found = metainfo.get("classes", metainfo.get("CLASSES"))
    if found is None:
        kind = dataset.get("type")
        kind = DATASETS.get(kind) if isinstance(kind, str) else kind
        found = (getattr(kind, "METAINFO", None) or {}).get("classes")
    if isinstance(found, str):
        return (found,) if not Path(found).is_file() else tuple(Path(found).read_text().split("\n"))
    return tuple(found) if isinstance(found, list | tuple) else None


def _counts(model: Mapping[str, Any], where: str = "model") -> Iterator[tuple[str, int]]:
    for name, value in model.items():
        parts = value if isinstance(value, list | tuple) else [value]
        for part in parts:
            if not isinstance(part, Mapping):
                continue
            if name in _HEADS and isinstance(part.get("num_classes"), int):
                yield f"{where}.{name}", part["num_classes"]
            if name in ("roi_head", "detector", *_HEADS):
                yield from _counts(part, f"{where}.{name}")


def _kind(part: Mapping[str, Any]) -> str:
    return str(part.get("type", "")).rpartition(".")[2]


def _is_elsewhere(dataset: Mapping[str, Any]) -> bool:
    """Whether a data set, or a step of its pipeline, reads from a bucket or a packed file."""
    steps = dataset.get("pipeline") or ()
    for part in (dataset, *(step for step in steps if isinstance(step, Mapping))):
        for name in ("backend_args", "file_client_args"):
            if (part.get(name) or {}).get("backend", "local") not in ("local", "disk"):
                return True
    return is_remote(str(dataset.get("data_root") or "")) or is_remote(str(dataset.get("ann_file") or ""))


def _join(root: str, path: str) -> str:
    return path if not root or Path(path).is_absolute() or is_remote(path) else str(Path(root, path))


def _exists(path: str) -> bool:
    return is_remote(path) or Path(path).expanduser().exists()


def _list_folder(folder: Path) -> str:
    if not folder.is_dir():
        return f"nor does the folder {folder}"
    return f"{folder} has {shorten(sorted(entry.name for entry in folder.iterdir())) or 'nothing'}"


def shorten(names: Sequence[Any]) -> str:
    """Join the first names for a message."""
    return ", ".join(map(str, names[:_MOST_NAMED])) + (", …" if len(names) > _MOST_NAMED else "")

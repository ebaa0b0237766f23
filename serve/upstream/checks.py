"""Checks of data sets, classes and checkpoints before upstream's runner starts and writes anything."""

from __future__ import annotations

import pickle
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from serve.errors import CheckpointError, DataSetError
from serve.storage import is_remote
from serve.upstream.data_files import reading_explained

__all__ = [
    "categories_checked",
    "check_annotations",
    "check_classes",
    "check_files",
    "check_tables",
    "checked_runner",
    "leaf_datasets",
]

# Heads of detectors whose number of classes is that of the data set.
_HEADS = ("bbox_head", "pts_bbox_head")
# Metrics that read the tables of a release, and upstream's version of it.
_TABLES = {"NuScenesMetric": "v1.0-trainval", "LyftMetric": "v1.01-train"}
_MOST_NAMED = 5


@contextmanager
def checked_runner(
    *, training: bool, out: str = "", allow_partial: bool = False, trust: bool = False
) -> Iterator[None]:
    """Check what `Runner.from_cfg` is given, within the block.

    Args:
        training: check the data set of training and validation, else that of testing and the checkpoint.
        out: file for predictions, of programs that have no such flag; empty for none.
        allow_partial: test although weights are missing or left over.
        trust: unpickle any type in checkpoints, which can run code.

    Raises:
        DataSetError: within the block: files are missing, or classes of data and model differ.
        CheckpointError: within the block: no such checkpoint, or one of another model.
    """
    from mmengine.runner import Runner

    from serve.storage import backends  # noqa: F401  (registers s3:// and packed files with mmengine)
    from serve.upstream.checkpoints import trust_checkpoints

    make = Runner.from_cfg
    scratch = tempfile.TemporaryDirectory(prefix="mmdet3d-serve-checkpoint-")

    made: list[tuple[Path, Path, bool]] = []

    def from_cfg(cls: Any, cfg: Any) -> Any:
        _check_config(cfg, training=training)
        work_dir = Path(cfg["work_dir"])
        is_new = not work_dir.exists()
        runner = make.__func__(cls, cfg)
        made.append((work_dir, Path(runner.log_dir), is_new))
        if training:
            _check_start(runner, allow_partial=allow_partial, trust=trust)
        else:
            _check_checkpoint(runner, Path(scratch.name), allow_partial=allow_partial, trust=trust)
            if out:
                _dump_results(runner, out)
        return runner

    Runner.from_cfg = classmethod(from_cfg)
    trust_checkpoints(trust)
    with scratch, categories_checked(), reading_explained(), _instances_forgotten():
        try:
            yield
        except (CheckpointError, DataSetError, FileNotFoundError, ImportError, pickle.UnpicklingError):
            for work_dir, log_dir, is_new in made:
                _remove_folders(work_dir, log_dir, is_new=is_new)
            raise
        finally:
            Runner.from_cfg = make
            trust_checkpoints(False)


@contextmanager
def _instances_forgotten() -> Iterator[None]:
    """Forget mmengine's named loggers, hubs and visualizers after the block: a second run would write to them."""
    from mmengine.registry import DefaultScope
    from mmengine.utils import ManagerMixin

    def kinds(parent: Any) -> Iterator[Any]:
        for kind in parent.__subclasses__():
            if kind is not DefaultScope:
                yield kind
                yield from kinds(kind)

    before = {kind: set(kind._instance_dict) for kind in kinds(ManagerMixin)}
    try:
        yield
    finally:
        for kind in kinds(ManagerMixin):
            for name in set(kind._instance_dict) - before.get(kind, set()):
                instance = kind._instance_dict.pop(name)
                for handler in getattr(instance, "handlers", ()):
                    handler.close()


def _check_config(cfg: Any, *, training: bool) -> None:
    from mmengine.registry import init_default_scope

    init_default_scope(cfg.get("default_scope", "mmdet"))
    splits = ["train", "val"] if training else ["test"]
    for split in splits:
        loader = cfg.get(f"{split}_dataloader")
        if loader is None or (split == "val" and cfg.get("val_cfg") is None):
            if split != "val":
                raise DataSetError(f"the config has no {split}_dataloader: nothing says which data to take")
            continue
        for dataset in leaf_datasets(loader["dataset"]):
            check_files(dataset, f"{split}_dataloader.dataset")
            check_classes(dataset, cfg["model"])
        evaluators = cfg.get(f"{split}_evaluator") or []
        for evaluator in [evaluators] if isinstance(evaluators, Mapping) else evaluators:
            check_annotations(evaluator, f"{split}_evaluator")
            for dataset in leaf_datasets(loader["dataset"]):
                check_tables(evaluator, dataset, f"{split}_evaluator")
    load_from = cfg.get("load_from")
    if isinstance(load_from, str) and "://" not in load_from and not Path(load_from).expanduser().is_file():
        raise CheckpointError(f"checkpoint {load_from} does not exist; check the path")


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
    return f"{folder} has {_shortened(sorted(entry.name for entry in folder.iterdir())) or 'nothing'}"


def check_classes(dataset: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    """Check that the heads of a detector have as many classes as the data set.

    Raises:
        DataSetError: they have not.
    """
    classes = _classes_of(dataset)
    if classes is None or any("language" in name for name in model):
        return
    for name, count in _counts(model):
        if count != len(classes):
            raise DataSetError(
                f"the model's {name}.num_classes is {count}, the data set {dataset.get('type')} has {len(classes)} "
                f"classes ({_shortened(classes)}); make them the same in the config: metainfo = dict(classes=…)"
            )


def _shortened(names: Sequence[Any]) -> str:
    return ", ".join(map(str, names[:_MOST_NAMED])) + (", …" if len(names) > _MOST_NAMED else "")


def _classes_of(dataset: Mapping[str, Any]) -> tuple[Any, ...] | None:
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
                f"classes ({_shortened(classes)}); name theirs with metainfo = dict(classes=…) in the config"
            )
        ordered = tuple(opened[-1].cats[number]["name"] for number in self.cat_ids)
        if ordered != tuple(classes):
            print(
                f"warning: {self.ann_file} lists its categories as {_shortened(ordered)}, and upstream gives labels in "
                f"that order, but metainfo has the classes {_shortened(classes)}: names would be mixed up; list them "
                "as the annotations do",
                file=sys.stderr,
            )
        return found

    CocoDataset.load_data_list = load_data_list
    try:
        yield
    finally:
        CocoDataset.load_data_list = load


def _check_start(runner: Any, *, allow_partial: bool, trust: bool) -> None:
    """Compare the checkpoint from which a training starts with the network.

    Raises:
        CheckpointError: no weight of it fits, or, where a training is resumed, not every weight does.
        DataSetError: a training is resumed with the classes in another order.
    """
    from serve.convert.checkpoint import load_checkpoint
    from serve.convert.legacy_weights import compare_keys, shapes_of

    file = runner._load_from
    if not isinstance(file, str) or "://" in file or allow_partial:
        return
    network = runner.model.module if hasattr(runner.model, "module") else runner.model
    shapes = shapes_of(network)
    checkpoint = load_checkpoint(file, trust=trust)
    mixed = _compare_order(checkpoint, runner._train_dataloader, file)
    if mixed and runner._resume:
        raise DataSetError(mixed)
    if mixed:
        print(f"warning: {mixed}; its heads are learned anew", file=sys.stderr)
    weights = checkpoint.state_dict
    report = compare_keys(weights, shapes)
    fitting = sum(
        name in shapes and tuple(value.shape) == tuple(shapes[name]) for name, value in weights.items()
    )
    if not fitting or (runner._resume and (report.missing or report.misshapen)):
        raise CheckpointError(
            f"checkpoint {file} is of another model: {fitting} of the {len(shapes)} weights of "
            f"{type(network).__name__} are in it; start from one of this config"
        )


def _check_checkpoint(runner: Any, scratch: Path, *, allow_partial: bool, trust: bool) -> None:
    """Compare a checkpoint with the network; former layouts are converted into a temporary file.

    Raises:
        CheckpointError: it is of another model.
        DataSetError: it has the data set's classes in another order.
    """
    from serve.convert.checkpoint import load_checkpoint
    from serve.convert.legacy_weights import adapt_and_load, compare_keys, shapes_of

    file = runner._load_from
    if not isinstance(file, str) or "://" in file:
        return
    checkpoint = load_checkpoint(file, trust=trust)
    if mixed := _compare_order(checkpoint, runner._test_dataloader, file):
        raise DataSetError(mixed)
    network = runner.model.module if hasattr(runner.model, "module") else runner.model
    shapes = shapes_of(network)
    report = compare_keys(checkpoint.state_dict, shapes)
    if not (report.missing or report.unexpected or report.misshapen):
        return
    found = len(shapes) - len(report.missing) - len(report.misshapen)
    if found * 2 < len(shapes) and not allow_partial:
        raise CheckpointError(
            f"checkpoint {file} is of another model: {found} of the {len(shapes)} weights of {type(network).__name__} "
            "are in it; pass the config that it was trained with"
        )
    try:
        adapt_and_load(network, checkpoint, allow_partial=allow_partial)
    except CheckpointError as error:
        first, *details = (line.strip() for line in str(error).splitlines() if line.strip())
        raise CheckpointError(f"checkpoint {file}: {first} {_shortened(details[1:2] or details)}") from error
    copy = scratch / Path(file).name
    torch.save({"state_dict": network.state_dict(), "meta": dict(checkpoint.meta)}, copy)
    runner._load_from = str(copy)


def _compare_order(checkpoint: Any, loader: Any, file: str) -> str | None:
    """Return a sentence if a checkpoint has the classes of the data in another order, so that labels would be mixed up.

    Other names are no error: some data sets spell theirs in several ways.
    """
    names = None
    with suppress(CheckpointError):  # a list of classes that cannot be read is not compared
        names = checkpoint.classes
    if names is None or not isinstance(loader, Mapping):
        return None
    for dataset in leaf_datasets(loader["dataset"]):
        classes = _classes_of(dataset)
        if classes is not None and classes != tuple(names) and sorted(classes) == sorted(names):
            return (
                f"checkpoint {file} has the classes {', '.join(names)}, the data set {dataset.get('type')} "
                f"{', '.join(classes)}: labels would be mixed up; name them in the checkpoint's order "
                "with metainfo = dict(classes=…) in the config"
            )
    return None


def _dump_results(runner: Any, out: str) -> None:
    """Have the runner write its predictions to a pickle file, as mmdet's program does for ``--out``."""
    from mmengine.evaluator import DumpResults

    runner.test_evaluator.metrics.append(DumpResults(out_file_path=out))


def _remove_folders(work_dir: Path, log_dir: Path, *, is_new: bool) -> None:
    """Remove what a run left that ended before its first iteration."""
    if is_new and not any(work_dir.rglob("*.pth")):
        shutil.rmtree(work_dir, ignore_errors=True)
        with suppress(OSError):  # ./work_dirs, unless other runs are in it
            work_dir.parent.rmdir()
    else:
        shutil.rmtree(log_dir, ignore_errors=True)

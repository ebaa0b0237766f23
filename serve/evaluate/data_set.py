"""Test data set and metrics of a config, built by upstream's registries after checks that name what is missing.

Upstream reports a missing file in its own ways, and an annotation file of other categories not at all: mmdet then
numbers those that it finds.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve.convert.blame import blaming, describe
from serve.convert.config import parse_config, read_config
from serve.errors import DataSetError
from serve.protocol.frame_spec import FrameSpec
from serve.runtime.custom_code import import_modules
from serve.runtime.object_paths import resolve_objects
from serve.runtime.pipeline import box_type_of, frame_spec, pipeline_of
from serve.upstream.data_set_checks import (
    categories_checked,
    check_annotations,
    check_files,
    check_tables,
    leaf_datasets,
)

__all__ = ["DataSet", "DataSettings", "data_settings", "open_data_set", "upstream_session"]

_LOADER, _EVALUATOR = "test_dataloader", "test_evaluator"


@dataclass(frozen=True)
class DataSettings:
    """What a config says about its test data.

    Attributes:
        source: the config, for messages.
        scope: ``mmdet`` or ``mmdet3d``.
        data_set: the data set, as in ``test_dataloader.dataset``.
        metrics: the metrics, as in ``test_evaluator``.
        spec: frames that a model of this pipeline takes.
    """

    source: Path
    scope: str
    data_set: dict[str, Any]
    metrics: tuple[dict[str, Any], ...]
    spec: FrameSpec

    @property
    def backend(self) -> dict[str, Any] | None:
        """Storage of the frames, as mmengine's ``backend_args``: that of the first loader, or else the data set's."""
        for step in self.data_set.get("pipeline") or ():
            named = step.get("backend_args") or step.get("file_client_args")
            if _is_loader(step) and named:
                return dict(named)
        given = self.data_set.get("backend_args")
        return dict(given) if given else None


@dataclass(frozen=True)
class DataSet:
    """A test data set that upstream built.

    Attributes:
        dataset: upstream's object; ``dataset[k]`` runs the pipeline on frame ``k``.
        settings: what it was built from.
        classes: class names by label.
        box_type_3d: ``LiDAR``, ``Camera`` or ``Depth``; None for 2D boxes.
        size: number of frames to evaluate, the first ones.
    """

    dataset: Any
    settings: DataSettings
    classes: tuple[str, ...]
    box_type_3d: str | None
    size: int

    @property
    def is_limited(self) -> bool:
        """Whether there are more frames than are evaluated."""
        return self.size < len(self.dataset)


def data_settings(
    config: Path, options: Mapping[str, Any] | None = None, data: Path | None = None
) -> DataSettings:
    """Read test data and metrics from a config.

    Args:
        config: path of a model's config; without a model, of data alone.
        options: values that replace those of the config, by dotted name.
        data: another config, whose data set and metrics are taken; the pipeline stays that of `config`.

    Raises:
        ArchiveError: a config cannot be read.
        DataSetError: it describes no test data or no metrics, or `options` do not fit.
    """
    own = _read(config, options if data is None else None)
    chosen = own if data is None else _read(data, options)
    source = data or config
    loader, evaluator = chosen.get(_LOADER), chosen.get(_EVALUATOR)
    if not isinstance(loader, Mapping) or not isinstance(loader.get("dataset"), Mapping):
        raise DataSetError(f"{source} has no {_LOADER}.dataset, so there is no data set to evaluate on")
    metrics = [evaluator] if isinstance(evaluator, Mapping) else evaluator
    if not isinstance(metrics, Sequence) or not metrics or not all(isinstance(m, Mapping) for m in metrics):
        raise DataSetError(f"{source} has no {_EVALUATOR}, so there is no metric to compute")
    _import_custom_modules(chosen, source)
    with blaming(f"config {source}"):
        data_set, listed = resolve_objects(loader["dataset"]), resolve_objects(list(metrics))
        if data is not None:
            data_set = _with_pipeline_of(read_config(config).full, data_set)
        data_set = _with_latest_sweeps(data_set)
        scope = str(own.get("default_scope") or chosen.get("default_scope") or _scope_of(data_set))
        spec = frame_spec({**own, "default_scope": scope, _LOADER: {"dataset": data_set}})
    return DataSettings(source, scope, data_set, tuple(dict(metric) for metric in listed), spec)


def open_data_set(settings: DataSettings, limit: int | None = None) -> DataSet:
    """Check that the files are there, and let upstream read the annotations.

    Args:
        settings: from `data_settings`.
        limit: evaluate the first frames only, so many.

    Raises:
        DataSetError: a folder or file is missing, or the annotations are not of this data set's layout or classes.
    """
    _check_files(settings)
    with upstream_session(settings.scope), categories_checked():
        from mmengine.registry import DATASETS

        try:
            dataset = DATASETS.build(settings.data_set)
            if hasattr(dataset, "full_init"):
                dataset.full_init()
        except DataSetError:
            raise
        except Exception as error:
            raise DataSetError(
                f"{settings.source}: {settings.data_set.get('type')} cannot read its data: {describe(error)}"
            ) from error
    classes = tuple(str(name) for name in (getattr(dataset, "metainfo", None) or {}).get("classes") or ())
    if not classes:
        raise DataSetError(
            f"{settings.source}: the data set has no class names; set metainfo=dict(classes=…)"
        )
    if not len(dataset):
        raise DataSetError(f"{settings.source}: the data set has no frames")
    flat = settings.scope == "mmdet" or settings.spec.modality == "image"
    box_type = None if flat else box_type_of({_LOADER: {"dataset": settings.data_set}})
    size = min(limit or len(dataset), len(dataset))
    return DataSet(dataset, settings, classes, box_type, size)


@contextlib.contextmanager
def upstream_session(scope: str) -> Iterator[None]:
    """Enter upstream's registries of a package with its corrections; logs, prints and warnings are dropped.

    Args:
        scope: ``mmdet`` or ``mmdet3d``.
    """
    from serve.upstream import patches

    patches.apply()
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        from mmengine.logging import MMLogger
        from mmengine.registry import DefaultScope, init_default_scope

        if scope == "mmdet3d":
            import mmdet3d.datasets
            import mmdet3d.evaluation  # noqa: F401
        else:
            import mmdet.datasets
            import mmdet.evaluation  # noqa: F401
        MMLogger.get_current_instance().setLevel(logging.WARNING)
        init_default_scope(scope)
        with DefaultScope.overwrite_default_scope(scope), _without_bars():
            yield


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Let upstream's loops run without progress bars, which keep the standard output that they were defined with."""
    import mmengine

    bar = mmengine.track_iter_progress
    mmengine.track_iter_progress = iter
    try:
        yield
    finally:
        mmengine.track_iter_progress = bar


def _read(config: Path, options: Mapping[str, Any] | None) -> dict[str, Any]:
    full = parse_config(config)
    return _merge(full, options, config) if options else full


def _with_pipeline_of(full: Mapping[str, Any], data_set: dict[str, Any]) -> dict[str, Any]:
    """Give a data set the pipeline of a model's config, with loaders that read from the data set's storage."""
    backend = data_set.get("backend_args")
    pipeline = [
        {**step, "backend_args": backend} if _is_loader(step) and "backend_args" in step else dict(step)
        for step in resolve_objects(pipeline_of(full))
    ]
    return {**data_set, "pipeline": pipeline}


def _with_latest_sweeps(data_set: dict[str, Any]) -> dict[str, Any]:
    """Let the pipeline take the latest sweeps, as a server does; upstream draws some at random if not told so."""
    pipeline = data_set.get("pipeline")
    if not pipeline:
        return data_set
    steps = [
        {**step, "test_mode": True} if _kind(step) == "LoadPointsFromMultiSweeps" else step
        for step in pipeline
    ]
    return {**data_set, "pipeline": steps}


def _kind(step: Mapping[str, Any]) -> str:
    return str(step.get("type", "")).rpartition(".")[2]


def _is_loader(step: Mapping[str, Any]) -> bool:
    return _kind(step).startswith("Load")


def _merge(full: dict[str, Any], options: Mapping[str, Any], config: Path) -> dict[str, Any]:
    """Replace values by dotted names, as ``--cfg-options`` of upstream's tools does."""
    from mmengine.config import Config

    merged = Config(full)
    try:
        merged.merge_from_dict(dict(options))
    except Exception as error:
        raise DataSetError(f"{config} cannot take {', '.join(options)}: {describe(error)}") from error
    return dict(merged.to_dict())


def _import_custom_modules(full: Mapping[str, Any], config: Path) -> None:
    from serve.runtime.model import suppress_warnings

    if full.get("custom_imports"):
        with suppress_warnings(), blaming(f"config {config}"):
            import_modules(full, owner=f"config {config}", trust=True)


def _scope_of(data_set: Mapping[str, Any]) -> str:
    """Package of a data set whose config names none."""
    import mmdet3d.datasets  # noqa: F401  (fills the registry)
    from mmdet3d.registry import DATASETS

    return "mmdet3d" if DATASETS.module_dict.get(str(data_set.get("type"))) else "mmdet"


def _check_files(settings: DataSettings) -> None:
    """Look for the folders and files that the data set and the metrics name."""
    for dataset in leaf_datasets(settings.data_set):
        check_files(dataset, f"{_LOADER}.dataset")
    for metric in settings.metrics:
        check_annotations(metric, _EVALUATOR)
        for dataset in leaf_datasets(settings.data_set):
            check_tables(metric, dataset, _EVALUATOR)

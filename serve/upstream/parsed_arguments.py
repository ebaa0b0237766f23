"""Completion of the arguments that upstream's programs parse: the config's file, evaluators, the kind of drawing."""

from __future__ import annotations

import argparse
import importlib.util
import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from serve.errors import MissingPackage
from serve.upstream.config_argument import config_file

__all__ = ["completed_arguments", "spread_over_evaluators", "task_of", "with_visualization"]

_EVALUATOR = "test_evaluator."


@contextmanager
def completed_arguments(*, training: bool) -> Iterator[None]:
    """Have every parser's result name files and settings that upstream can use, within the block.

    Args:
        training: whether the program trains (see `serve.upstream.config_argument.config_file`).
    """
    parse = argparse.ArgumentParser.parse_args
    with ExitStack() as files:

        def parse_args(self: argparse.ArgumentParser, *args: Any, **named: Any) -> Any:
            found = parse(self, *args, **named)
            if isinstance(config := getattr(found, "config", None), str):
                found.config = files.enter_context(config_file(config, training=training))
                _complete(found)
            return found

        argparse.ArgumentParser.parse_args = parse_args  # type: ignore[method-assign]
        try:
            yield
        finally:
            argparse.ArgumentParser.parse_args = parse  # type: ignore[method-assign]


def _complete(found: argparse.Namespace) -> None:
    options = getattr(found, "cfg_options", None) or {}
    draws = bool(getattr(found, "show", False) or getattr(found, "show_dir", None))
    spreads = any(name.startswith(_EVALUATOR) for name in options)
    if not (draws or spreads):
        return
    from mmengine.config import Config

    config = Config.fromfile(found.config)
    if spreads:
        found.cfg_options = spread_over_evaluators(options, config.get("test_evaluator"))
    if draws and "show_dir" in found and "checkpoint" in found:
        found.cfg_options = {**with_visualization(config), **(found.cfg_options or {})}
    if draws and "task" in found:
        found.task = found.task or task_of(config)
        if found.show and found.task.startswith("lidar") and importlib.util.find_spec("open3d") is None:
            raise MissingPackage(
                "upstream shows point clouds with open3d, which is not installed; --show-dir writes pictures without it"
            )


def with_visualization(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return options that add the hook and the visualizer, which upstream's test.py wants for drawings."""
    in_3d = str(config.get("default_scope")) == "mmdet3d"
    options: dict[str, Any] = {}
    if "visualization" not in (config.get("default_hooks") or {}):
        hook = "Det3DVisualizationHook" if in_3d else "DetVisualizationHook"
        options["default_hooks.visualization"] = {"type": hook}
    if not config.get("visualizer"):
        kind = "Det3DLocalVisualizer" if in_3d else "DetLocalVisualizer"
        backends = [{"type": "LocalVisBackend"}]
        options["visualizer"] = {"type": kind, "vis_backends": backends, "name": "visualizer"}
    return options


def spread_over_evaluators(options: Mapping[str, Any], evaluators: Any) -> dict[str, Any]:
    """Give options of ``test_evaluator`` to each of several evaluators that takes them.

    Args:
        options: of ``--cfg-options``.
        evaluators: the config's; options are left alone unless it is a list.
    """
    if not isinstance(evaluators, list | tuple):
        return dict(options)
    from mmengine.registry import METRICS

    spread: dict[str, Any] = {}
    for name, value in options.items():
        setting = name.removeprefix(_EVALUATOR)
        if setting == name or setting.partition(".")[0].isdigit():
            spread[name] = value
            continue
        for number, evaluator in enumerate(evaluators):
            scope = str(evaluator.get("_scope_") or "mmdet")
            with METRICS.switch_scope_and_registry(scope) as registry:
                kind = registry.get(evaluator["type"])
            if kind is not None and setting in inspect.signature(kind.__init__).parameters:
                spread[f"{_EVALUATOR}{number}.{setting}"] = value
    return spread


def task_of(config: Mapping[str, Any]) -> str:
    """Value of ``--task``, which mmdet3d's test.py wants for drawings, by what the config's data set loads."""
    dataset = config["test_dataloader"]["dataset"]
    while "dataset" in dataset:
        dataset = dataset["dataset"]
    modality = dataset.get("modality") or config.get("input_modality") or {}
    if "Seg" in str(dataset.get("type")) or "SemanticKitti" in str(dataset.get("type")):
        return "lidar_seg"
    if modality.get("use_camera") and modality.get("use_lidar"):
        return "multi-modality_det"
    if modality.get("use_camera"):
        kinds = {str(step.get("type")) for step in dataset.get("pipeline") or ()}
        return "mono_det" if "LoadImageFromFileMono3D" in kinds else "multi-view_det"
    return "lidar_det"

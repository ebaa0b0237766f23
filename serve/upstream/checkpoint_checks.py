"""Checks of a checkpoint before upstream's runner: its model, its order of classes."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from serve.errors import CheckpointError, DataSetError
from serve.upstream.data_set_checks import classes_of, leaf_datasets, shorten

__all__ = ["check_test_checkpoint", "check_training_checkpoint"]


def check_training_checkpoint(runner: Any, *, allow_partial: bool, trust: bool) -> None:
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


def check_test_checkpoint(runner: Any, scratch: Path, *, allow_partial: bool, trust: bool) -> None:
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
        raise CheckpointError(f"checkpoint {file}: {first} {shorten(details[1:2] or details)}") from error
    copy = scratch / Path(file).name
    torch.save({"state_dict": network.state_dict(), "meta": dict(checkpoint.meta)}, copy)
    runner._load_from = str(copy)


def _compare_order(checkpoint: Any, loader: Any, file: str) -> str | None:
    """Describe the difference if a checkpoint has the data's classes in another order.

    Labels would be mixed up. Other names are no error: some data sets spell theirs in several ways.
    """
    names = None
    with suppress(CheckpointError):  # a list of classes that cannot be read is not compared
        names = checkpoint.classes
    if names is None or not isinstance(loader, Mapping):
        return None
    for dataset in leaf_datasets(loader["dataset"]):
        classes = classes_of(dataset)
        if classes is not None and classes != tuple(names) and sorted(classes) == sorted(names):
            return (
                f"checkpoint {file} has the classes {', '.join(names)}, the data set {dataset.get('type')} "
                f"{', '.join(classes)}: labels would be mixed up; name them in the checkpoint's order "
                "with metainfo = dict(classes=…) in the config"
            )
    return None

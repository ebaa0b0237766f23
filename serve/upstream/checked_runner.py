"""Upstream's runner, with checks of data and checkpoint before it writes anything."""

from __future__ import annotations

import pickle
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from serve.errors import CheckpointError, DataSetError
from serve.upstream.checkpoint_checks import check_test_checkpoint, check_training_checkpoint
from serve.upstream.data_files import reading_explained
from serve.upstream.data_set_checks import (
    categories_checked,
    check_annotations,
    check_classes,
    check_files,
    check_tables,
    leaf_datasets,
)

__all__ = ["checked_runner"]


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
            check_training_checkpoint(runner, allow_partial=allow_partial, trust=trust)
        else:
            check_test_checkpoint(runner, Path(scratch.name), allow_partial=allow_partial, trust=trust)
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

"""Files of data sets while upstream's programs run: unreadable ones become sentences, written ones appear whole."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from serve.convert.blame import describe
from serve.errors import DataSetError, ServeError

__all__ = ["reading_explained", "written_whole"]

_SPOILED = (AssertionError, ValueError, EOFError, KeyError, TypeError, pickle.UnpicklingError)
# An assertion of upstream on --format-only.
_WITHOUT_PREFIX = "outfile_prefix must be not"
# Of an info file before mmdet3d 1.1, as mmengine reports it.
_FORMER_INFOS = "should be a dict, but got <class 'list'>"

# mmengine packs the list of frames with numpy.
_EMPTY = "need at least one array to concatenate"


@contextmanager
def reading_explained() -> Iterator[None]:
    """Raise `DataSetError` in place of what spoiled annotations raise in data sets and metrics, within the block."""
    from mmdet.datasets.base_det_dataset import BaseDetDataset
    from mmengine.dataset import BaseDataset
    from mmengine.runner import Runner

    kinds = (BaseDataset, BaseDetDataset)
    loads = [kind.__dict__["full_init"] for kind in kinds]
    build = Runner.build_evaluator

    def build_evaluator(self: Any, evaluator: Any) -> Any:
        try:
            return build(self, evaluator)
        except _SPOILED as error:
            if _WITHOUT_PREFIX in str(error):
                raise DataSetError(
                    "format_only (--format-only) writes files and has no name for them; add --cfg-options "
                    "test_evaluator.outfile_prefix=FOLDER/NAME"
                ) from error
            raise DataSetError(f"the metrics of the config cannot be made: {describe(error)}") from error

    for kind, load in zip(kinds, loads, strict=True):
        kind.full_init = _explaining(load)
    Runner.build_evaluator = build_evaluator
    try:
        yield
    finally:
        Runner.build_evaluator = build
        for kind, load in zip(kinds, loads, strict=True):
            kind.full_init = load


def _explaining(load: Callable[[Any], None]) -> Callable[[Any], None]:
    def full_init(self: Any) -> None:
        name, file = type(self).__name__, getattr(self, "ann_file", "")
        try:
            load(self)
        except (ServeError, OSError, ImportError, MemoryError):
            raise
        except Exception as error:
            if _EMPTY in str(error):
                raise DataSetError(_without_frames(name, file)) from error
            hint = (
                "; info files of mmdet3d before 1.1 are converted by `mmdet3d-serve tools update_infos_to_v2`"
                if _FORMER_INFOS in str(error)
                else ""
            )
            raise DataSetError(
                f"{name} cannot read its annotations {file}: {describe(error)}{hint}"
            ) from error
        if not len(self):
            raise DataSetError(_without_frames(name, file))

    return full_init


def _without_frames(name: str, file: str) -> str:
    return f"{name} has no frames: {file} lists none, or its filter (filter_cfg) leaves none"


@contextmanager
def written_whole() -> Iterator[None]:
    """Have mmengine write local files beside their place and rename them, within the block.

    So a full disk or Ctrl-C leaves no half checkpoint, info file or result file, and keeps a former one.
    """
    from mmengine.fileio import LocalBackend

    put, put_text = LocalBackend.put, LocalBackend.put_text

    def put_whole(self: Any, obj: bytes, filepath: Any) -> None:
        with _beside(filepath) as path:
            put(self, obj, path)

    def put_text_whole(self: Any, obj: str, filepath: Any, encoding: str = "utf-8") -> None:
        with _beside(filepath) as path:
            put_text(self, obj, path, encoding)

    LocalBackend.put, LocalBackend.put_text = put_whole, put_text_whole
    try:
        yield
    finally:
        LocalBackend.put, LocalBackend.put_text = put, put_text


@contextmanager
def _beside(filepath: Any) -> Iterator[str]:
    target = Path(os.path.realpath(filepath))
    if target.exists() and not target.is_file():  # /dev/stdout, a pipe
        yield str(target)
        return
    unfinished = target.with_name(f".{target.name}.{os.getpid()}.unfinished")
    try:
        yield str(unfinished)
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)

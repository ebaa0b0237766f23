"""Allow-list of the types in OpenMMLab checkpoints, each replaced by a harmless stand-in.

`torch.load(weights_only=True)` rejects real OpenMMLab checkpoints, because they carry meta and message-hub
objects besides the weights. Every type they are known to carry is allowed here *by name* and replaced by a stand-in:
a number, a plain dict, a checked array or an inert object. Only this module, torch and the constructors of dates and
slices are called, whatever the file contains; mmengine need not be installed.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

__all__ = ["History", "Inert", "safe_globals_for_openmmlab"]

_DTYPE_CODE = re.compile(r"[?bBhHiIlLqQefdFD]|[biufc]\d{1,2}|[SU]\d{1,6}")


@contextlib.contextmanager
def safe_globals_for_openmmlab() -> Iterator[None]:
    """Let torch.load(weights_only=True) read OpenMMLab checkpoints inside the ``with`` block.

    Serves mmengine's ``load_checkpoint`` and mmdet's / mmdet3d's ``init_*`` too, which torch >= 2.6 otherwise stops
    at the first meta object. Blocks may be nested; each removes exactly the names it added. torch keeps one
    allow-list per process, so other threads see the names as well.
    """
    present = set(torch.serialization.get_safe_globals())
    added = [pair for pair in _ALLOWED if pair not in present]
    with torch.serialization.safe_globals(added):  # type: ignore[arg-type]
        yield


class Inert:
    """Stand-in for an object that serving does not need; keeps only the name of its type."""

    of = "object"

    def __new__(cls, *_: Any, **__: Any) -> Inert:
        """Ignore all arguments."""
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        return

    def __setstate__(self, _: Any) -> None:
        """Ignore the state."""

    def __repr__(self) -> str:
        return f"<{self.of}>"


class History(Inert):
    """Stand-in for mmengine's HistoryBuffer that keeps the values, so that a training can be resumed."""

    of = "mmengine.logging.history_buffer.HistoryBuffer"

    def __init__(self, *_: Any, **__: Any) -> None:
        self.state: dict[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        """Keep numbers and arrays of the state."""
        kept = state if isinstance(state, dict) else {}
        self.state = {
            str(name): value for name, value in kept.items() if isinstance(value, int | float | np.ndarray)
        }


class _PlainDict:
    """Stand-in for dict-like types; constructing one returns a real dict."""

    def __new__(cls, *args: Any) -> dict[Any, Any]:  # type: ignore[misc]
        return dict(args[0]) if args and isinstance(args[0], dict) else {}


class _Dtype:
    """Stand-in for numpy.dtype; accepts plain numbers and text only."""

    def __init__(self, code: Any = "", *_: Any) -> None:
        self._code, self._order = code, "="

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) < 5 or any(part is not None for part in state[2:5]):
            raise pickle.UnpicklingError("GLOBAL numpy.dtype with fields is not allowed")
        self._order = state[1]

    def real(self) -> np.dtype[Any]:
        if not isinstance(self._code, str) or not _DTYPE_CODE.fullmatch(self._code):
            raise pickle.UnpicklingError(f"GLOBAL numpy.dtype of {self._code!r} is not allowed")
        return np.dtype((">" if self._order == ">" else "<") + self._code)


class _Array(np.ndarray[Any, Any]):
    """Stand-in for numpy.ndarray: numbers or text with a complete buffer, never objects."""

    def __new__(cls, *_: Any) -> _Array:
        return np.ndarray.__new__(cls, (0,))

    def __setstate__(self, state: Any) -> None:
        try:
            _, shape, dtype, fortran, data = state
            real = dtype.real()
            complete = len(data) == math.prod(shape) * real.itemsize
        except (TypeError, ValueError, AttributeError) as error:
            raise pickle.UnpicklingError("GLOBAL numpy.ndarray in an unknown form") from error
        if not isinstance(data, bytes) or not complete or any(size < 0 for size in shape):
            raise pickle.UnpicklingError("GLOBAL numpy.ndarray of objects is not allowed")
        super().__setstate__((1, tuple(shape), real, bool(fortran), data))  # type: ignore[arg-type]


def _array(*_: Any) -> _Array:
    return _Array()


def _scalar(dtype: Any, data: Any = b"") -> Any:
    if not isinstance(dtype, _Dtype) or not isinstance(data, bytes) or len(data) != dtype.real().itemsize:
        raise pickle.UnpicklingError("GLOBAL numpy scalar in an unknown form")
    return np.frombuffer(data, dtype.real())[0]


def _attribute(*_: Any) -> Inert:
    """Stand-in for getattr, by which old message hubs name HistoryBuffer's methods; looks nothing up."""
    return Inert()


def _bytes(*args: Any) -> bytes:
    """Stand-in for bytes(), which pickle protocol 2 calls for empty bytes."""
    if args:
        raise pickle.UnpicklingError("GLOBAL builtins.bytes with arguments is not allowed")
    return b""


def _frozenset(*args: Any) -> frozenset[Any]:
    return frozenset(args[0] if args and isinstance(args[0], list) else ())


def _path(*parts: Any) -> str:
    return str(Path(*(part for part in parts if isinstance(part, str))))


def _list_allowed() -> list[tuple[Any, str]]:
    """List (stand-in, name in the pickle) of every type that OpenMMLab checkpoints are known to carry."""
    pairs: list[tuple[Any, str]] = []
    for core in ("numpy.core", "numpy._core"):
        pairs += [(_array, f"{core}.multiarray._reconstruct"), (_scalar, f"{core}.multiarray.scalar")]
    pairs += [(_Array, "numpy.ndarray"), (_Dtype, "numpy.dtype"), (_attribute, "builtins.getattr")]
    pairs.append((_bytes, "builtins.bytes"))
    for name in (
        *("mmengine.config.config.ConfigDict", "mmengine.config.ConfigDict", "mmcv.utils.config.ConfigDict"),
        *("addict.addict.Dict", "collections.defaultdict", "builtins.dict"),
    ):
        pairs.append((_PlainDict, name))
    for kind in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path"):
        pairs += [(_path, f"pathlib.{kind}"), (_path, f"pathlib._local.{kind}")]
    for simple in (datetime.datetime, datetime.date, datetime.time, datetime.timedelta, datetime.timezone):
        pairs.append((simple, f"datetime.{simple.__name__}"))
    pairs += [(_frozenset, "builtins.frozenset"), (slice, "builtins.slice")]
    inert = [
        *("mmengine.logging.message_hub.MessageHub", "mmcv.runner.log_buffer.LogBuffer"),
        *("argparse.Namespace", "types.SimpleNamespace"),
        # A scheduler that keeps one of its own functions in its state.
        "mmengine.optim.scheduler.param_scheduler.OneCycleParamScheduler",
        *(f"builtins.{name}" for name in ("list", "tuple", "int", "float", "str", "bool", "object", "range")),
        *(f"numpy.{name}" for name in ("float16", "float32", "float64", "int32", "int64", "uint8", "bool_")),
    ]
    for module, names in (
        ("lidar_box3d", ("LiDARInstance3DBoxes",)),
        ("cam_box3d", ("CameraInstance3DBoxes",)),
        ("depth_box3d", ("DepthInstance3DBoxes",)),
        ("box_3d_mode", ("Box3DMode",)),
        ("coord_3d_mode", ("Coord3DMode",)),
    ):
        for parent in ("mmdet3d.structures.bbox_3d", "mmdet3d.core.bbox.structures"):
            inert += [f"{parent}.{module}.{name}" for name in names]
    pairs += [(type("Inert", (Inert,), {"of": name}), name) for name in inert]
    return [*pairs, (History, History.of), (Inert, f"{__name__}.Inert")]


_ALLOWED = _list_allowed()

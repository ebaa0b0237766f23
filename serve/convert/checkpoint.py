"""Read a checkpoint as data: weights and meta come out, nothing in the file is run.

`torch.load(weights_only=True)` refuses real OpenMMLab checkpoints, because they carry meta and message-hub
objects besides the weights. Here every type that they are known to carry is allowed *by name* and replaced
by a stand-in of ours: a number, a plain dict, a checked array or an inert object. Besides torch, this module
and the constructors of dates and slices, nothing is called, whatever the file says, and
mmengine need not even be installed. Any other type is refused by name, unless the caller trusts the file.

Does not know which model the weights are for: shapes, old layouts and missing keys are the business of
`serve.convert.legacy_weights`. Optimizer, scheduler, message hub and EMA duplicates are dropped: mmengine's EMA hook
swaps the averaged weights into ``state_dict`` when it saves, so ``state_dict`` is what to serve.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from serve.errors import CheckpointError

__all__ = ["Checkpoint", "load_checkpoint", "safe_globals_for_openmmlab"]

_HOLDERS = ("state_dict", "model_state_dict", "model")
_MAX_DEPTH = 24
_MAX_ITEMS = 20_000
_DTYPE_CODE = re.compile(r"[?bBhHiIlLqQefdFD]|[biufc]\d{1,2}|[SU]\d{1,6}")
_BLOCKED = re.compile(r"GLOBAL ([\w.]+)")


@dataclass(frozen=True)
class Checkpoint:
    """What is kept of a checkpoint."""

    state_dict: dict[str, torch.Tensor]
    """Name → weight, on the CPU, in the file's order; carries torch's ``_metadata`` where the file had it."""
    meta: dict[str, Any]
    """The checkpoint's ``meta`` with JSON types only; {} where there was none."""
    versions: dict[str, int]
    """Module path → the version torch recorded with its weights; {} where the file has none."""
    dropped: tuple[str, ...] = ()
    """What else the file held, by name."""
    notes: tuple[str, ...] = ()
    """Sentences on what was changed while reading."""

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Class names in the order of the labels, from ``dataset_meta`` or, before 1.0, ``CLASSES``."""
        found = self._of_dataset("classes")
        if isinstance(found, str):
            return (found,)
        return tuple(str(name) for name in found) if isinstance(found, list) and found else None

    @property
    def palette(self) -> list[list[int]] | None:
        """One [r, g, b] in 0…255 per class, or None."""
        found = self._of_dataset("palette")
        colors = found if isinstance(found, list) else []
        if not all(isinstance(color, list) and len(color) == 3 for color in colors):
            return None
        return [[int(part) for part in color] for color in colors] or None

    def _of_dataset(self, key: str) -> Any:
        dataset = self.meta.get("dataset_meta")
        for source in (dataset if isinstance(dataset, dict) else {}, self.meta):
            for spelled in (key, key.upper()):
                if source.get(spelled) is not None:
                    return source[spelled]
        return None


def load_checkpoint(path: str | Path, *, trust: bool = False) -> Checkpoint:
    """Read a ``.pth`` file of torch.save (old or new format) or a ``.safetensors`` file.

    ``module.`` in front of every name (DistributedDataParallel) is taken off. Weights are memory-mapped where
    the format allows: do not overwrite the file while they are in use.

    Args:
        path: the file.
        trust: run what a pickle asks for instead of refusing unknown types. Only for files from people you
            would let run programs here.

    Raises:
        CheckpointError: no such file, damaged, not a checkpoint, or it carries a type that is not allowed;
            the sentence names the type and ``--trust-checkpoint``.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}.")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    return _interpret(_unpickle(path, trust=trust), path)


@contextlib.contextmanager
def safe_globals_for_openmmlab() -> Iterator[None]:
    """Let torch.load(weights_only=True) read OpenMMLab checkpoints inside the ``with`` block.

    For code that is not ours, such as mmengine's ``load_checkpoint`` and mmdet's / mmdet3d's ``init_*``,
    which torch ≥ 2.6 otherwise stops at the first meta object. May be nested; on the way out exactly those
    names are taken back that were put in. The allow-list is one per process: other threads see it, too.
    """
    present = set(torch.serialization.get_safe_globals())
    added = [pair for pair in _ALLOWED if pair not in present]
    with torch.serialization.safe_globals(added):  # type: ignore[arg-type]
        yield


# --- the stand-ins ----------------------------------------------------------------------------------------


class _Inert:
    """Stands for an object nobody needs; remembers only its type's name."""

    of = "object"

    def __new__(cls, *_: Any, **__: Any) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        return

    def __setstate__(self, _: Any) -> None:
        return

    def __repr__(self) -> str:
        return f"<{self.of}>"


class _PlainDict:
    """Stands for dict-like types; making one gives a real dict."""

    def __new__(cls, *args: Any) -> dict[Any, Any]:  # type: ignore[misc]
        return dict(args[0]) if args and isinstance(args[0], dict) else {}


class _Dtype:
    """Stands for numpy.dtype; only plain numbers and text are accepted."""

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
    """Stands for numpy.ndarray: numbers or text whose bytes are all there; never objects."""

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


def _attribute(*_: Any) -> _Inert:
    """Stands for getattr, which old message hubs use to name HistoryBuffer's methods; gets nothing."""
    return _Inert()


def _bytes(*args: Any) -> bytes:
    """Stands for bytes, which protocol 2 calls for empty ones."""
    if args:
        raise pickle.UnpicklingError("GLOBAL builtins.bytes with arguments is not allowed")
    return b""


def _frozenset(*args: Any) -> frozenset[Any]:
    return frozenset(args[0] if args and isinstance(args[0], list) else ())


def _path(*parts: Any) -> str:
    return str(Path(*(part for part in parts if isinstance(part, str))))


def _allowed() -> list[tuple[Any, str]]:
    """Give (stand-in, name in the pickle) of everything OpenMMLab checkpoints are known to carry."""
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
        *("mmengine.logging.history_buffer.HistoryBuffer", "mmengine.logging.message_hub.MessageHub"),
        *("mmcv.runner.log_buffer.LogBuffer", "argparse.Namespace", "types.SimpleNamespace"),
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
    pairs += [(type("_Inert", (_Inert,), {"of": name}), name) for name in inert]
    return [*pairs, (_Inert, "serve.convert.checkpoint._Inert")]


_ALLOWED = _allowed()


# --- reading ----------------------------------------------------------------------------------------------


def _unpickle(path: Path, *, trust: bool) -> Any:
    head = _head(path)
    if not head:
        raise CheckpointError(f"{path} is empty.")
    if head.lstrip()[:1] == b"<":
        raise CheckpointError(f"{path} is a web page, not a checkpoint: the download went wrong.")
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a Git LFS pointer, not the checkpoint itself: run 'git lfs pull'.")
    try:
        if trust:
            return torch.load(path, map_location="cpu", weights_only=False)
        with safe_globals_for_openmmlab():
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged pickle may raise anything at all
        raise CheckpointError(_why_unreadable(path, error, trust=trust)) from error


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(64)


def _why_unreadable(path: Path, error: Exception, *, trust: bool) -> str:
    first = str(error).splitlines()[0] if str(error) else type(error).__name__
    if trust:
        return f"{path} cannot be read even when trusted: {type(error).__name__}: {first}."
    refused = _refused_types(path) or sorted(set(_BLOCKED.findall(str(error))))
    if refused:
        whole = any(name.startswith(("torch.nn.modules.", "mmdet")) for name in refused)
        hint = " It looks like a whole pickled model: save its state_dict() instead." if whole else ""
        return (
            f"{path} carries {', '.join(refused)}, which a checkpoint has no need of and which could run "
            f"code; if you trust who made it, say --trust-checkpoint.{hint}"
        )
    if "TorchScript" in str(error):
        return f"{path} is a TorchScript program, not a checkpoint with weights."
    return f"{path} is damaged or not a checkpoint: {type(error).__name__}: {first}."


def _refused_types(path: Path) -> list[str]:
    """Give every type of a zip-format checkpoint that is not allowed; [] when that cannot be told."""
    look = getattr(torch.serialization, "get_unsafe_globals_in_checkpoint", None)
    if look is None:
        return []
    # `is_zipfile` too raises on some damage: it reads the end of the file (Python 3.11).
    with contextlib.suppress(Exception), safe_globals_for_openmmlab():
        if not zipfile.is_zipfile(path):
            return []
        return sorted(look(path))
    return []


def _interpret(raw: Any, path: Path) -> Checkpoint:
    if not isinstance(raw, Mapping):
        raise CheckpointError(f"{path} holds a {type(raw).__name__} where a checkpoint is a dict.")
    holders = [key for key in _HOLDERS if isinstance(raw.get(key), Mapping)]
    source, weights = (holders[0], raw[holders[0]]) if holders else ("", raw)
    kept: dict[str, torch.Tensor] = {}
    odd: list[str] = []
    for name, value in weights.items():
        tensor = _as_tensor(value)
        if isinstance(name, str) and tensor is not None:
            kept[name] = tensor
        elif source:
            odd.append(str(name))
    if not kept or (not source and len(kept) * 2 < len(raw)):
        names = ", ".join(map(str, list(raw)[:8])) or "nothing"
        raise CheckpointError(f"{path} holds no weights; what it has is {names}.")
    if empty := [name for name, tensor in kept.items() if tensor.is_meta]:
        raise CheckpointError(f"{path} holds only the shapes of {len(empty)} weights such as {empty[0]}.")

    notes = [f"{len(odd)} entries that are no tensors were dropped: {', '.join(odd[:4])}"] if odd else []
    versions = _versions(getattr(weights, "_metadata", None))
    if all(name.startswith("module.") for name in kept):
        kept = {name.removeprefix("module."): tensor for name, tensor in kept.items()}
        versions = {name.removeprefix("module").lstrip("."): version for name, version in versions.items()}
        notes.append("'module.' was taken off every name")
    doubles = _ema_doubles(kept)
    if doubles:
        kept = {name: tensor for name, tensor in kept.items() if name not in doubles}
        notes.append(f"{len(doubles)} 'ema_' buffers of the training were dropped")
    dropped = tuple(sorted(str(key) for key in raw if key not in (source, "meta"))) if source else ()
    meta = raw.get("meta") if source else None
    return Checkpoint(
        _with_metadata(kept, versions),
        _plain(meta) if isinstance(meta, Mapping) else {},
        versions,
        dropped,
        tuple(notes),
    )


def _read_safetensors(path: Path) -> Checkpoint:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            header = file.metadata() or {}
            kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged or not a safetensors file: {error}.") from error
    if not kept:
        raise CheckpointError(f"{path} holds no weights.")
    meta: dict[str, Any] = {}
    for key, text in header.items():
        try:
            meta[key] = json.loads(text)
        except ValueError:
            meta[key] = text
    return Checkpoint(_with_metadata(kept, {}), meta, {})


def _as_tensor(value: Any) -> torch.Tensor | None:
    if isinstance(value, torch.Tensor):
        dense = value.detach()
        return dense.to_dense() if dense.layout is not torch.strided else dense
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return torch.from_numpy(np.array(value))
    return None


def _versions(metadata: Any) -> dict[str, int]:
    if not isinstance(metadata, Mapping):
        return {}
    pairs = ((name, entry.get("version")) for name, entry in metadata.items() if isinstance(entry, Mapping))
    return {str(name): version for name, version in pairs if isinstance(version, int)}


def _with_metadata(weights: dict[str, torch.Tensor], versions: dict[str, int]) -> dict[str, torch.Tensor]:
    """Give the weights as torch wants them: modules see with which version of themselves they were saved."""
    result: OrderedDict[str, torch.Tensor] = OrderedDict(weights)
    if versions:
        metadata = OrderedDict((name, {"version": number}) for name, number in versions.items())
        result._metadata = metadata  # type: ignore[attr-defined]
    return result


def _ema_doubles(weights: Mapping[str, torch.Tensor]) -> set[str]:
    """Name the buffers mmdet 2's EMA hooks left in the model: ``ema_`` and the name with ``_`` for ``.``."""
    return {f"ema_{name.replace('.', '_')}" for name in weights} & set(weights)


def _plain(value: Any, depth: int = 0) -> Any:
    """Give the value in JSON types; what has none, or is too deep or long, becomes a short text."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, np.generic):
        return _plain(value.item(), depth)
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, (np.ndarray, torch.Tensor)):
        size = value.size if isinstance(value, np.ndarray) else value.numel()
        return _plain(value.tolist(), depth) if size <= _MAX_ITEMS else f"<array of {size} numbers>"
    if depth >= _MAX_DEPTH:
        return "…"
    if isinstance(value, Mapping):
        return {str(_plain(key, depth + 1)): _plain(entry, depth + 1) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry, depth + 1) for entry in value[:_MAX_ITEMS]]
    if isinstance(value, (set, frozenset)):
        return sorted((_plain(entry, depth + 1) for entry in value), key=str)
    if isinstance(value, type) and issubclass(value, _Inert):
        return value.of
    return str(value)

"""Read weights and meta of a checkpoint as data, without running anything in the file.

Types outside the allow-list of `serve.convert.safe_globals` are rejected by name, unless the caller trusts the file.
Shapes, old layouts and missing keys are left to `serve.convert.legacy_weights`. Optimizer, scheduler, message hub and
EMA duplicates are dropped: mmengine's EMA hook swaps the averaged weights into ``state_dict`` when it saves, so
``state_dict`` holds the weights to serve.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from serve.convert.name_lists import last_named, ordered_names
from serve.convert.pickle_size import check_size_in_memory
from serve.convert.safe_globals import Inert, safe_globals_for_openmmlab
from serve.errors import CheckpointError

__all__ = ["Checkpoint", "load_checkpoint"]

_HOLDERS = ("state_dict", "model_state_dict", "model", "ema_state_dict")
_MAX_DEPTH = 24
_MAX_ITEMS = 20_000
_MAX_VALUES = 1_000_000
_MAX_TEXT_CHARS = 10_000
# A weight that is shared is counted once per name; expanded and sparse buffers are small.
_EXPANSION, _FREE_BYTES = 4, 64 << 20
_BLOCKED = re.compile(r"GLOBAL ([\w.]+)")
# A file of names that was not there in training: mmengine then records its path.
_PATH = re.compile(r"[/\\]|\.\w{1,5}$")


@dataclass(frozen=True)
class Checkpoint:
    """Weights and meta of a checkpoint."""

    state_dict: dict[str, torch.Tensor]
    """Name → weight, on the CPU, in the file's order; carries torch's ``_metadata`` if the file has it."""
    meta: dict[str, Any]
    """The checkpoint's ``meta`` with JSON types only; {} if it has none."""
    versions: dict[str, int]
    """Module path → the version that torch recorded with its weights; {} if the file has none."""
    dropped: tuple[str, ...] = ()
    """Names of the other entries of the file."""
    notes: tuple[str, ...] = ()
    """Remarks on changes made while reading."""

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Class names in the order of the labels, from ``dataset_meta`` or, before 1.0, ``CLASSES``.

        Raises:
            CheckpointError: they are no list of names.
        """
        dataset = self.meta.get("dataset_meta")
        found = last_named(dataset) if isinstance(dataset, dict) else None
        found = last_named(self.meta) if found is None else found
        if not found:
            return None
        if isinstance(found, str) and not _PATH.search(found):
            return (found,)
        try:
            return ordered_names(found)
        except ValueError as error:
            raise CheckpointError(
                f"the class names in the checkpoint's meta cannot be read: {error}; name them with --classes cat,dog "
                "or --classes FILE"
            ) from None


def load_checkpoint(path: str | Path, *, trust: bool = False) -> Checkpoint:
    """Read a ``.pth`` file of torch.save (old or new format) or a ``.safetensors`` file.

    The prefix ``module.`` (DistributedDataParallel) is removed from all names. Weights are memory-mapped if the
    format allows it: do not overwrite the file while they are in use.

    Args:
        path: the file.
        trust: unpickle unknown types too, which can run code. Only for files from people you would let run
            programs on this machine.

    Raises:
        CheckpointError: no such file, damaged, not a checkpoint, or it carries a type that is not allowed;
            the message names the type and ``--trust-checkpoint``.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} does not exist; check the path")
    try:
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        if not trust:
            check_size_in_memory(path)
        # Indices of a sparse tensor beyond its shape would otherwise be written to.
        with torch.sparse.check_sparse_tensor_invariants(True):  # type: ignore[no-untyped-call]
            return _parse(_unpickle(path, trust=trust), path)
    except CheckpointError:
        raise
    except Exception as error:  # whatever damage makes a reader raise
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise CheckpointError(f"{path} is damaged or not a checkpoint: {reason}") from error


def _unpickle(path: Path, *, trust: bool) -> Any:
    with path.open("rb") as file:
        head = file.read(64)
    if not head:
        raise CheckpointError(f"checkpoint {path} is empty; copy or download it again")
    if head.lstrip()[:1] == b"<":
        raise CheckpointError(f"{path} is a web page, not a checkpoint; download it again")
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a Git LFS pointer, not the checkpoint itself; run 'git lfs pull'")
    try:
        if trust:
            return torch.load(path, map_location="cpu", weights_only=False)
        with safe_globals_for_openmmlab():
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged pickle can raise any exception
        raise CheckpointError(_explain(path, error, trust=trust)) from error


def _explain(path: Path, error: Exception, *, trust: bool) -> str:
    """Message for a checkpoint that cannot be unpickled."""
    first = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
    if "weights_only" in first:  # torch's advice to unpickle anything
        first = "torch.save did not write it"
    if trust:
        return f"{path} cannot be read even with --trust-checkpoint: {type(error).__name__}: {first}"
    blocked = _list_blocked_types(path) or sorted(set(_BLOCKED.findall(str(error))))
    if blocked:
        is_model = any(name.startswith(("torch.nn.modules.", "mmdet")) for name in blocked)
        hint = "; it looks like a whole pickled model: save its state_dict() instead" if is_model else ""
        return (
            f"{path} carries {', '.join(blocked)}, which no checkpoint needs and which could run code; "
            f"if you trust its author, pass --trust-checkpoint{hint}"
        )
    if "TorchScript" in str(error):
        return f"{path} is a TorchScript program, not a checkpoint with weights; save a state_dict()"
    return f"{path} is damaged or not a checkpoint: {type(error).__name__}: {first}"


def _list_blocked_types(path: Path) -> list[str]:
    """Every type of a zip-format checkpoint that is not on the allow-list; [] for other formats."""
    list_unsafe = getattr(torch.serialization, "get_unsafe_globals_in_checkpoint", None)
    if list_unsafe is None:
        return []
    # `is_zipfile` reads the end of the file and raises on some damage too (Python 3.11).
    with contextlib.suppress(Exception), safe_globals_for_openmmlab():
        if not zipfile.is_zipfile(path):
            return []
        return sorted(list_unsafe(path))
    return []


def _parse(raw: Any, path: Path) -> Checkpoint:
    if not isinstance(raw, Mapping):
        raise CheckpointError(f"{path} holds a {type(raw).__name__}; a checkpoint holds a dict")
    holders = [key for key in _HOLDERS if isinstance(raw.get(key), Mapping)]
    source, weights = (holders[0], raw[holders[0]]) if holders else ("", raw)
    averaged = source == "ema_state_dict"  # of mmengine's EMA hook, without the network's own
    if averaged:
        weights = {name: value for name, value in weights.items() if name != "steps"}
    kept: dict[str, torch.Tensor] = {}
    odd: list[str] = []
    _check_dense_sizes(weights, path)
    for name, value in weights.items():
        tensor = _as_tensor(value)
        if isinstance(name, str) and tensor is not None:
            kept[name] = tensor
        elif source:
            odd.append(str(name))
    if not kept or (not source and len(kept) * 2 < len(raw)):
        names = ", ".join(map(str, list(raw)[:8])) or "nothing"
        raise CheckpointError(f"{path} holds no weights, only {names}; save a state_dict()")
    if empty := [name for name, tensor in kept.items() if tensor.is_meta]:
        raise CheckpointError(
            f"{path} holds the shapes but not the values of {len(empty)} weights, as {empty[0]}"
        )

    notes = [f"dropped {len(odd)} entries that are not tensors: {', '.join(odd[:4])}"] if odd else []
    if averaged:
        notes.append("the file has averaged weights only (ema_state_dict), which are taken")
    versions = _read_versions(getattr(weights, "_metadata", None))
    if all(name.startswith("module.") for name in kept):
        kept = {name.removeprefix("module."): tensor for name, tensor in kept.items()}
        versions = {name.removeprefix("module").lstrip("."): version for name, version in versions.items()}
        notes.append("removed the prefix 'module.' from all names")
    duplicates = _find_ema_duplicates(kept)
    if duplicates:
        kept = {name: tensor for name, tensor in kept.items() if name not in duplicates}
        notes.append(f"dropped {len(duplicates)} 'ema_' buffers of training")
    dropped = tuple(sorted(str(key) for key in raw if key not in (source, "meta"))) if source else ()
    meta = raw.get("meta") if source else None
    return Checkpoint(
        _attach_metadata(kept, versions),
        _to_json_types(meta) if isinstance(meta, Mapping) else {},
        versions,
        dropped,
        tuple(notes),
    )


def _check_dense_sizes(weights: Mapping[Any, Any], path: Path) -> None:
    """Check that the weights do not need many times the file's bytes: a view repeats a value, a sparse tensor zeros.

    Raises:
        CheckpointError: they do.
    """
    most = _EXPANSION * path.stat().st_size + _FREE_BYTES
    total = 0
    for name, value in weights.items():
        if isinstance(value, torch.Tensor) and not value.is_meta:
            total += value.numel() * value.element_size()
            if total > most:
                raise CheckpointError(
                    f"{path} has weights that need over {most >> 20} MiB, far more than the file, as "
                    f"{str(name)[:100]}; save a state_dict() of contiguous tensors"
                )


def _read_safetensors(path: Path) -> Checkpoint:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            header = file.metadata() or {}
            kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} is damaged or not a safetensors file: {error}") from error
    if not kept:
        raise CheckpointError(f"{path} holds no weights")
    meta: dict[str, Any] = {}
    for key, text in header.items():
        try:
            meta[key] = json.loads(text)
        except ValueError:
            meta[key] = text
    return Checkpoint(_attach_metadata(kept, {}), meta, {})


def _as_tensor(value: Any) -> torch.Tensor | None:
    if isinstance(value, torch.Tensor):
        dense = value.detach()
        return dense.to_dense() if dense.layout is not torch.strided else dense
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return torch.from_numpy(np.array(value))
    return None


def _read_versions(metadata: Any) -> dict[str, int]:
    if not isinstance(metadata, Mapping):
        return {}
    pairs = ((name, entry.get("version")) for name, entry in metadata.items() if isinstance(entry, Mapping))
    return {str(name): version for name, version in pairs if isinstance(version, int)}


def _attach_metadata(weights: dict[str, torch.Tensor], versions: dict[str, int]) -> dict[str, torch.Tensor]:
    """Attach torch's ``_metadata``, from which modules read the version they were saved with."""
    result: OrderedDict[str, torch.Tensor] = OrderedDict(weights)
    if versions:
        metadata = OrderedDict((name, {"version": number}) for name, number in versions.items())
        result._metadata = metadata  # type: ignore[attr-defined]
    return result


def _find_ema_duplicates(weights: Mapping[str, torch.Tensor]) -> set[str]:
    """Names of mmdet 2's EMA buffers: ``ema_`` and the weight's name with ``_`` for ``.``."""
    return {f"ema_{name.replace('.', '_')}" for name in weights} & set(weights)


def _to_json_types(value: Any, depth: int = 0, left: list[int] | None = None) -> Any:
    """Convert a value to JSON types; other, too deep or too long values become a short text.

    `left` counts down over the whole value, because a pickle can refer to one list many times.
    """
    left = [_MAX_VALUES] if left is None else left
    left[0] -= 1
    if left[0] < 0:
        return "…"
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, np.generic):
        return _to_json_types(value.item(), depth, left)
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, (np.ndarray, torch.Tensor)):
        size = value.size if isinstance(value, np.ndarray) else value.numel()
        return (
            _to_json_types(value.tolist(), depth, left)
            if size <= _MAX_ITEMS
            else f"<array of {size} numbers>"
        )
    if depth >= _MAX_DEPTH:
        return "…"
    if isinstance(value, Mapping):
        return {
            str(_to_json_types(key, depth + 1, left)): _to_json_types(entry, depth + 1, left)
            for key, entry in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_to_json_types(entry, depth + 1, left) for entry in value[:_MAX_ITEMS]]
    if isinstance(value, (set, frozenset)):
        return sorted((_to_json_types(entry, depth + 1, left) for entry in value), key=str)
    if isinstance(value, type) and issubclass(value, Inert):
        return value.of
    return str(value)[:_MAX_TEXT_CHARS]

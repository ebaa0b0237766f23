"""Whole checkpoints for mmengine's runner, read as data: weights, optimizer, schedulers and the message hub.

`serve.convert.checkpoint` keeps the weights only. A training that is resumed needs the rest too, in mmengine's types.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import IO, Any

import torch

from serve.convert.safe_globals import History, Inert, safe_globals_for_openmmlab

__all__ = ["load_whole_checkpoint", "trust_checkpoints"]

_HUB = ("log_scalars", "runtime_info", "resumed_keys")
# What a scheduler keeps of its own code comes back as a stand-in; a new scheduler has it already.
_SCHEDULERS = {"param_schedulers"}
_trusted = False


def trust_checkpoints(trusted: bool) -> None:
    """Choose whether `load_whole_checkpoint` unpickles any type, which can run code."""
    global _trusted
    _trusted = trusted


def load_whole_checkpoint(file: str | IO[bytes], map_location: Any = None, **_: Any) -> Any:
    """Read what `torch.save` wrote, in place of `torch.load`.

    Types outside of the allow-list of `serve.convert.safe_globals` are refused.

    Args:
        file: path or open file.
        map_location: as in `torch.load`.

    Raises:
        pickle.UnpicklingError: the file carries another type; `trust_checkpoints` was not called, and torch's own
            variable TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD is not set.
    """
    if _trusted:
        return torch.load(file, map_location=map_location, weights_only=False)
    # Since torch 2.6 without `weights_only` the same as with it, but for TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD.
    with safe_globals_for_openmmlab():
        raw = torch.load(file, map_location=map_location)
    if isinstance(raw, dict) and "message_hub" in raw:
        hub = raw["message_hub"]
        raw["message_hub"] = {
            name: _rebuild(hub.get(name, {})) if isinstance(hub, Mapping) else {} for name in _HUB
        }
    for name in _SCHEDULERS & set(raw) if isinstance(raw, dict) else ():
        raw[name] = _rebuild(raw[name])
    # mmengine runs this text as Python when a training is resumed.
    if isinstance(raw, dict) and isinstance(raw.get("meta"), dict):
        raw["meta"].pop("config", None)
    return raw


def _rebuild(value: Any) -> Any:
    """Turn stand-ins of a message hub into mmengine's own types; what carries nothing is left out."""
    if isinstance(value, History):
        return _history(value.state)
    if isinstance(value, Mapping):
        kept = {name: _rebuild(inner) for name, inner in value.items()}
        return {name: inner for name, inner in kept.items() if not _is_empty(inner)}
    if isinstance(value, list):
        return [_rebuild(inner) for inner in value]
    return value


def _is_empty(value: Any) -> bool:
    return isinstance(value, Inert) and not isinstance(value, History)


def _history(state: Mapping[str, Any]) -> Any:
    from mmengine.logging import HistoryBuffer

    return HistoryBuffer(
        log_history=state.get("_log_history", ()),
        count_history=state.get("_count_history", ()),
        max_length=int(state.get("max_length", 1_000_000)),
    )

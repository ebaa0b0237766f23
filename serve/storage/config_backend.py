"""A config's own ``backend_args`` for its data sets, pipeline steps and metrics.

mmengine resolves the variables of a base before the members of its child, so ``backend_args = dict(…)`` on top of a
config of the zoo would reach none of the base's parts, whose ``backend_args`` is None.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Iterator, Mapping, MutableMapping
from functools import wraps
from typing import Any

__all__ = ["apply_to_configs", "give_backend"]

_KEY = "backend_args"
_PARTS = ("_dataloader", "_evaluator", "_pipeline")
_APPLIED = "_gives_backend_args"


def apply_to_configs() -> None:
    """Have `mmengine.Config` call `give_backend` for what it reads and for what is merged into it. Idempotent."""
    from mmengine.config import Config

    if hasattr(Config, _APPLIED):
        return
    initialize, merge = Config.__init__, Config.merge_from_dict

    @wraps(initialize)
    def __init__(self: Any, *args: Any, **named: Any) -> None:
        initialize(self, *args, **named)
        _give(self._cfg_dict)

    @wraps(merge)
    def merge_from_dict(self: Any, *args: Any, **named: Any) -> None:
        merge(self, *args, **named)
        _give(self._cfg_dict)

    Config.__init__, Config.merge_from_dict = __init__, merge_from_dict
    setattr(Config, _APPLIED, True)


def _give(config: MutableMapping[str, Any]) -> None:
    given = give_backend(config)
    if given:
        backend = config[_KEY].get("backend")
        print(
            f"note: backend_args of the config ({backend}) is now that of {given} data sets, steps and metrics too",
            file=sys.stderr,
        )


def give_backend(config: MutableMapping[str, Any]) -> int:
    """Give each data set, step and metric the config's top-level ``backend_args`` unless it has its own.

    Args:
        config: with or without ``backend_args``; changed in place.

    Returns:
        How many parts got it.
    """
    backend = config.get(_KEY)
    if not isinstance(backend, Mapping) or not backend:
        return 0
    scope = str(config.get("default_scope") or "mmengine")
    given = 0
    for name, value in config.items():
        if not name.endswith(_PARTS):
            continue
        for key, part in _walk(name, value):
            if part.get(_KEY) is None and not part.get("file_client_args") and _takes(key, part, scope):
                part[_KEY] = copy.deepcopy(backend)
                given += 1
    return given


def _walk(key: str, value: Any) -> Iterator[tuple[str, MutableMapping[str, Any]]]:
    """Yield the dictionaries in a member of a config, each with the key that it, or its list, stands at."""
    if isinstance(value, list | tuple):
        for one in value:
            yield from _walk(key, one)
    elif isinstance(value, MutableMapping):
        yield key, value
        for name, inner in list(value.items()):
            if name != _KEY:
                yield from _walk(name, inner)


def _takes(key: str, part: Mapping[str, Any], scope: str) -> bool:
    if _KEY in part or key == "db_sampler":
        return True
    kind = part.get("type")
    return kind is not None and _has_parameter(_find_class(kind, scope))


def _find_class(kind: Any, scope: str) -> Any:
    if not isinstance(kind, str):
        return kind
    from mmengine import registry

    for group in (registry.TRANSFORMS, registry.DATASETS, registry.METRICS):
        with group.switch_scope_and_registry(scope) as scoped:
            try:
                found = scoped.get(kind)
            except (ImportError, KeyError):  # reported where it is built
                continue
        if found is not None:
            return found
    return None


def _has_parameter(kind: Any) -> bool:
    """Whether a class takes ``backend_args``, itself or by passing its keywords on to a base."""
    if not inspect.isclass(kind):
        return False
    for base in kind.__mro__:
        if "__init__" not in base.__dict__:
            continue
        try:
            parameters = inspect.signature(base.__dict__["__init__"]).parameters
        except ValueError:
            return False
        if _KEY in parameters:
            return True
        if all(one.kind is not inspect.Parameter.VAR_KEYWORD for one in parameters.values()):
            return False
    return False

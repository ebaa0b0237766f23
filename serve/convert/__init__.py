"""Convert a config and a checkpoint to an archive that proves itself.

Its names are imported on use, so that the reader of checkpoints (`serve.convert.safe_globals`) works in an environment
of torch and mmcv alone, where mmengine uses it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from serve.convert.classes import configured_classes
    from serve.convert.config import resolve_config
    from serve.convert.conversion import Conversion, ConversionResult, convert

__all__ = ["Conversion", "ConversionResult", "configured_classes", "convert", "resolve_config"]

_MODULES = {
    "Conversion": "conversion",
    "ConversionResult": "conversion",
    "configured_classes": "classes",
    "convert": "conversion",
    "resolve_config": "config",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)

"""Settings: the mechanism (`options`), the names (`names`) and the settings of every process (`process`).

The only reader of the environment. Imports no torch, numpy or cv2, and pydantic only for what needs it: the kernels
are used where there is none (`kernels`).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from serve.settings.names import PREFIX, RENAMED, Renamed, warn_renamed

if TYPE_CHECKING:
    from serve.settings.options import (
        CONFIG,
        FilePath,
        Flag,
        Names,
        OptionalCount,
        OptionalPath,
        OptionalText,
        OptionInfo,
        Options,
        Text,
        option,
    )
    from serve.settings.process import MAX_FRAME_BYTES, Limits, Preference, Settings

__all__ = [
    "CONFIG",
    "MAX_FRAME_BYTES",
    "PREFIX",
    "RENAMED",
    "FilePath",
    "Flag",
    "Limits",
    "Names",
    "OptionInfo",
    "OptionalCount",
    "OptionalPath",
    "OptionalText",
    "Options",
    "Preference",
    "Renamed",
    "Settings",
    "Text",
    "option",
    "warn_renamed",
]

_OF_PROCESS = frozenset({"MAX_FRAME_BYTES", "Limits", "Preference", "Settings"})


def __getattr__(name: str) -> Any:
    """Import a name from the module that has it, at its first use."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{'process' if name in _OF_PROCESS else 'options'}")
    value = globals()[name] = getattr(module, name)
    return value

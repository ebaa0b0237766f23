"""Settings: the mechanism (`options`), the names (`names`) and the settings of every process (`process`).

The only reader of the environment. Imports no torch, numpy or cv2.
"""

from serve.settings.names import PREFIX, RENAMED, Renamed, warn_renamed
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

"""Config and checkpoint to an archive that proves itself."""

from serve.convert.conversion import Conversion, Converted, configured_classes, convert, resolve_config

__all__ = ["Conversion", "Converted", "configured_classes", "convert", "resolve_config"]

"""Config and checkpoint to an archive that proves itself."""

from serve.convert.conversion import Conversion, ConversionResult, configured_classes, convert, resolve_config

__all__ = ["Conversion", "ConversionResult", "configured_classes", "convert", "resolve_config"]

"""Convert a config and a checkpoint to an archive that proves itself."""

from serve.convert.config import configured_classes, resolve_config
from serve.convert.conversion import Conversion, ConversionResult, convert

__all__ = ["Conversion", "ConversionResult", "configured_classes", "convert", "resolve_config"]

"""Convert a config and a checkpoint to an archive that proves itself."""

from serve.convert.classes import configured_classes
from serve.convert.config import resolve_config
from serve.convert.conversion import Conversion, ConversionResult, convert

__all__ = ["Conversion", "ConversionResult", "configured_classes", "convert", "resolve_config"]

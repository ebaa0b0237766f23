"""Convert, serve and verify OpenMMLab detectors. Importing it imports nothing heavy."""

__version__ = "0.2.0.dev0"

__all__ = ["__version__"]

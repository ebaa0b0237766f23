"""mmdet3d-serve: OpenMMLab detectors as a service.

This package holds everything with logic in it. `handlers/` adapts it to TorchServe,
`tools/` gives it command lines. Importing `serve` imports nothing heavy.
"""

__version__ = "0.2.0.dev0"

__all__ = ["__version__"]

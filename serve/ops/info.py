"""Build information of the extension, which mmcv prints in ``collect_env``."""

from __future__ import annotations

import platform

__all__ = ["get_compiler_version", "get_compiling_cuda_version"]


def get_compiler_version() -> str:
    """Return the version of Python in place of the C++ compiler's."""
    return f"none (serve.ops on Python {platform.python_version()})"


def get_compiling_cuda_version() -> str:
    """Return a placeholder for nvcc's version."""
    return "not available"

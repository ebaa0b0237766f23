"""What mmcv prints about its extension in ``collect_env``. Computes nothing."""

from __future__ import annotations

import platform

__all__ = ["get_compiler_version", "get_compiling_cuda_version"]


def get_compiler_version() -> str:
    """In place of the C++ compiler: the Python that runs the kernels."""
    return f"none (serve.ops on Python {platform.python_version()})"


def get_compiling_cuda_version() -> str:
    """In place of nvcc's version."""
    return "not available"

"""Which kernels mmcv uses: for mmcv's ``collect_env``, and as ``python -m serve.ops.info`` for people.

The program imports ``mmcv.ops`` as anybody's code does and reports what it got.
"""

from __future__ import annotations

import importlib.machinery
import platform
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

__all__ = ["get_compiler_version", "get_compiling_cuda_version"]

_AUTOLOAD = "mmdet3d_serve_autoload"
_PACKAGES = ("mmcv", "mmcv-lite", "mmengine", "mmdet", "mmdet3d", "torch", "torchvision", "numba", "numpy")


def get_compiler_version() -> str:
    """Return the version of Python in place of the C++ compiler's."""
    return f"none (serve.ops on Python {platform.python_version()})"


def get_compiling_cuda_version() -> str:
    """Return a placeholder for nvcc's version."""
    return "not available"


def main() -> int:
    """Print the kernels in use and what they depend on; returns 1 if ``mmcv.ops`` cannot be imported."""
    print("autoload   " + _describe_autoload())
    failure = _import_ops()
    for line in failure or _describe_kernels():
        print(line)
    print("packages   " + ", ".join(_versions()))
    return 1 if failure else 0


def _describe_autoload() -> str:
    module = sys.modules.get(_AUTOLOAD)
    if module is None:
        return "off: the .pth file of the wheel is not in this environment; call serve.ops.install() first"
    return f"on, by {Path(str(module.__file__)).with_suffix('.pth')}"


def _import_ops() -> list[str]:
    """Import ``mmcv.ops``; returns lines about what failed, none if it succeeded."""
    try:
        import mmcv.ops  # noqa: F401
    except Exception as error:  # an extension that does not fit torch raises OSError or ImportError
        return [
            "kernels    none: mmcv.ops cannot be imported",
            f"           {type(error).__name__}: {error}",
        ] + [f"           {note}" for note in getattr(error, "__notes__", ())]
    return []


def _describe_kernels() -> Iterator[str]:
    import mmcv
    import torch

    from serve import __version__
    from serve.ops import EXTENSION, kernels_in_use

    compiled = importlib.machinery.PathFinder.find_spec(EXTENSION, mmcv.__path__)
    if kernels_in_use() == "portable":
        yield f"kernels    portable: serve.ops of mmdet3d-serve {__version__}, {Path(__file__).parent}"
        if compiled is not None:
            yield f"           MMDET3D_SERVE_OPS=portable: {compiled.origin} is not used"
    else:
        yield f"kernels    compiled: {getattr(sys.modules[EXTENSION], '__file__', None)}"
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 1, 11, 11], [20, 20, 30, 30]])
    _, kept = mmcv.ops.nms(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.5)
    yield f"           nms keeps boxes {kept.tolist()} of 3, [0, 2] is right"
    yield f"mmcv       {mmcv.__version__}, {Path(mmcv.__file__).parent}"


def _versions() -> Iterator[str]:
    for name in _PACKAGES:
        try:
            yield f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            continue


if __name__ == "__main__":
    sys.exit(main())

"""TorchServe handlers: thin adapters over `serve.worker.handler`. Archives name these modules as their handler.

TorchServe puts the folder of the unpacked archive on Python's search path and starts the worker in it. Before anything
else is imported, such folders are taken off the path: no file of an archive may stand in for a module. (A server that
`mmdet3d-serve serve` starts never puts them there, see `serve.torchserve.java.worker_python`.)
"""

import os
import sys


def _is_unpacked_archive(folder: str) -> bool:
    return os.path.isfile(os.path.join(folder, "MAR-INF", "MANIFEST.json"))


sys.path[:] = [folder for folder in sys.path if not _is_unpacked_archive(folder or os.curdir)]

# An ImportError would make TorchServe look for a handler of its own, and report that one as missing.
from serve.errors import SetupError  # noqa: E402

try:
    import serve.worker.handler  # noqa: F401
except ImportError as error:
    raise SetupError(
        f"the worker cannot import {error.name}: {error}; install it where the model is served"
    ) from error

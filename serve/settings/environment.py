"""Environment of child processes that run this package, and variables for libraries that read some."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import serve

__all__ = [
    "child_environment",
    "die_with_parent",
    "filter_python_path",
    "has_display",
    "launcher_variables",
    "ray_address",
    "variable_set",
]

_PR_SET_PDEATHSIG = 1  # of linux/prctl.h
_LAUNCHER_VARIABLES = (
    *("NNODES", "NODE_RANK", "PORT", "MASTER_ADDR"),
    *("GPUS", "GPUS_PER_NODE", "CPUS_PER_TASK", "SRUN_ARGS"),
)
# Variables, besides those that start with TS_, that change TorchServe's configuration.
_FOREIGN_VARIABLES = ("LOG_LOCATION", "METRICS_LOCATION", "TEMP")


def child_environment(*, inherit_path: bool = True) -> dict[str, str]:
    """Environment of a child: `serve` and `handlers` importable, without TorchServe's variables.

    Args:
        inherit_path: append the ``PYTHONPATH`` of this process, as absolute paths: a child may have another working
            directory, TorchServe's workers an unpacked archive.
    """
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("TS_") and name not in _FOREIGN_VARIABLES
    }
    root = str(Path(serve.__file__).resolve().parent.parent)
    inherited = environment.get("PYTHONPATH", "").split(os.pathsep) if inherit_path else []
    environment["PYTHONPATH"] = os.pathsep.join(
        [root, *(os.path.abspath(folder) for folder in inherited if folder)]
    )
    return environment


@contextmanager
def variable_set(name: str, value: str) -> Iterator[None]:
    """Set an environment variable of this process within the block."""
    former = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if former is None:
            del os.environ[name]
        else:
            os.environ[name] = former


def launcher_variables() -> dict[str, str]:
    """Variables that upstream's ``dist_train.sh`` and ``slurm_train.sh`` read, those that are set."""
    return {name: os.environ[name] for name in _LAUNCHER_VARIABLES if os.environ.get(name)}


def ray_address() -> str | None:
    """Address of the Ray cluster that this process was started for, which Ray sets for its jobs; None without one."""
    return os.environ.get("RAY_ADDRESS") or None


def has_display() -> bool:
    """Whether a window can be opened: X11 or Wayland."""
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def filter_python_path(keep: Callable[[str], bool]) -> None:
    """Drop the folders of ``PYTHONPATH`` that `keep` rejects, for child processes of this one."""
    if "PYTHONPATH" in os.environ:
        places = os.environ["PYTHONPATH"].split(os.pathsep)
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(keep, places))


def die_with_parent() -> None:
    """In a child before exec: have the kernel end it when its parent dies, however that dies (Linux)."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))

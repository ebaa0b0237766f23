"""Build of torch, which depends on the machine and so is outside the lock.

A torch that is importable and within TORCH_RANGE is kept. The lower bound is the first release whose
`torch.load(weights_only=True)` is safe (CVE-2025-32434); the upper bound is the first minor release that this project
has not been run with (`make check-range`). pip installs torch, with its own order of indexes.

The driver of a GPU is not looked at. Without an index for torch it is the build that the configured index offers first.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from tools.environment.packages import LOCKED, PIP, pip
from tools.environment.venv import SetupFailed, venv_python

__all__ = [
    "TORCH_DEFAULT",
    "install_torch",
    "installed_torch",
    "torch_in_range",
    "torch_range_text",
    "unpack_torch",
]

TORCH_RANGE = ((2, 6), (2, 15))  # at least, below
TORCH_DEFAULT = "2.13.0"
PROBE_TORCH = "import torch; print(torch.__version__)"


def torch_in_range(version: str) -> bool:
    """Whether a torch version is one that this project keeps."""
    low, below = TORCH_RANGE
    return low <= parse_version(version) < below


def torch_range_text() -> str:
    """TORCH_RANGE as a requirement."""
    (a, b), (c, d) = TORCH_RANGE
    return f"torch>={a}.{b},<{c}.{d}"


def parse_version(text: str) -> tuple[int, int]:
    """Major and minor of a version such as `2.13.0+cpu` or `2.14.0a0+git1`."""
    major, minor = text.split("+")[0].split(".")[:2]
    return int(major), int("".join(c for c in minor if c.isdigit()) or 0)


def installed_torch(python: Path) -> str | None:
    """Version of the torch that `python` can import, or None."""
    quick = "import importlib.util as u, sys; sys.exit(0 if u.find_spec('torch') else 1)"
    if subprocess.run([str(python), "-c", quick], capture_output=True, check=False).returncode:
        return None
    found = subprocess.run([str(python), "-c", PROBE_TORCH], capture_output=True, text=True, check=False)
    return found.stdout.strip() if found.returncode == 0 else None


def unpack_torch(venv: Path, version: str, index_url: str | None, lock: Path | None) -> list[str] | None:
    """Command that installs torch without what it needs, or None if there is one; `install_torch` adds the rest."""
    if installed_torch(venv_python(venv)) is not None:
        return None
    return [str(venv_python(venv)), *PIP, "--quiet", "--no-deps", *_torch_source(version, index_url, lock)]


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


def _torch_source(version: str, index_url: str | None, lock: Path | None) -> list[str]:
    """Arguments of pip for the torch to install."""
    source = ["--index-url", index_url] if index_url else []
    if lock is not None:
        return [*LOCKED, *source, "-r", str(lock.resolve())]
    return ["--only-binary=:all:", *source, f"torch=={version}"]

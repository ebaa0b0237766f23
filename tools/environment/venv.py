"""Virtual environment: the Python that makes it, and whether one can be kept."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

__all__ = ["ROOT", "SetupFailed", "check_python", "keep_bytecode", "usable", "venv_python"]

ROOT = Path(__file__).resolve().parents[2]


MINIMUM_PYTHON = (3, 11)


class SetupFailed(Exception):
    """A step failed; the text is a sentence for the user."""


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


def keep_bytecode() -> dict[str, str]:
    """Return the environment variables with which Python keeps the bytecode of what it imports.

    Images and CI often have PYTHONDONTWRITEBYTECODE set: every worker then compiles some 4,000 files anew, for 7 s.
    """
    return {name: text for name, text in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}

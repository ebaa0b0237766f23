"""Build the wheel of the client alone, mmdet3d-serve-client, from the sources of this project.

python -m tools.client_wheel [FOLDER]    build it into FOLDER (default: build/client) and print its path and size
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

__all__ = ["build", "main"]

ROOT = Path(__file__).parents[1]
#: What the wheel is made of: serve.client, and all of this project that it imports.
SOURCES = ("serve/__init__.py", "serve/py.typed", "serve/errors.py", "serve/client", "serve/formats")
_METADATA = ("client/pyproject.toml", "client/README.md", "LICENSE")


def build(folder: Path) -> Path:
    """Build the wheel; returns its path.

    Args:
        folder: where it goes; older wheels there are left alone.

    Raises:
        subprocess.CalledProcessError: pip failed; its output has the reason.
    """
    with tempfile.TemporaryDirectory(prefix="mmdet3d-serve-client-") as name:
        source, built = Path(name) / "source", Path(name) / "built"
        for each in SOURCES:
            target = source / each
            target.parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / each).is_dir():
                shutil.copytree(ROOT / each, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copyfile(ROOT / each, target)
        for each in _METADATA:
            shutil.copyfile(ROOT / each, source / Path(each).name)
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet", "--no-deps"]
        offline = ["--no-build-isolation", "--no-index"]
        subprocess.run([*pip, *offline, "--wheel-dir", str(built), str(source)], check=True)
        (wheel,) = built.glob("*.whl")
        folder.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copy(wheel, folder))


def main() -> int:
    """Build and print; returns the exit code."""
    wheel = build(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "client")
    print(f"{wheel} ({wheel.stat().st_size / 1000:.1f} kB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())

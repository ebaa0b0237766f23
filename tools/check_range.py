"""Show the supported range of torch and Python at both ends: ``make check-range``.

    python -m tools.check_range                       every Python found, with the ends of torch's range
    python -m tools.check_range --python P --torch V  one combination

Each combination gets an environment of its own from tools/setup_env.py, is asked to convert the demo SECOND,
and then to reproduce the recorded answer of an archive that *this* environment's torch has made. What an index does not
have for a Python is reported as "not obtainable" and is no failure. Environments are removed when they are done with;
one with a CUDA build of torch takes some 6 GB while it lasts.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.11", "3.12", "3.13")
TORCHES = ("2.6.0", "2.14.1")
NOT_OBTAINABLE = ("No matching distribution", "no versions of", "has no wheels with a matching")
# Runs in the environment under test: the answer that another torch recorded has to come out.
SMOKE = """
import sys, torch
from pathlib import Path
from serve.archive import open_directory
from serve.runtime.detector import load_detector
from serve.runtime.selftest import self_test
found = open_directory(Path(sys.argv[1]))
seconds = self_test(load_detector(found, torch.device("cpu")), found)
print(f"torch {torch.__version__}, golden frame reproduced in {seconds:.1f} s")
"""


def find_pythons() -> Iterator[tuple[str, Path]]:
    """Version and interpreter of each Python of PYTHONS on PATH, or among those of pyenv."""
    for version in PYTHONS:
        candidates: list[str | Path | None] = [
            shutil.which(f"python{version}"),
            *sorted(_pyenv().glob(f"{version}.*/bin/python3")),
        ]
        for candidate in [one for one in candidates if one is not None]:
            probe = "import ensurepip, sys; print('%d.%d' % sys.version_info[:2])"
            ran = subprocess.run([str(candidate), "-c", probe], capture_output=True, text=True, check=False)
            if ran.stdout.strip() == version:
                yield version, Path(candidate)
                break
        else:
            print(f"Python {version}: not on this machine", flush=True)


def _pyenv() -> Path:
    ran = (
        subprocess.run(["pyenv", "root"], capture_output=True, text=True, check=False)
        if shutil.which("pyenv")
        else None
    )
    return Path(ran.stdout.strip() if ran else "/nonexistent") / "versions"


def check(python: Path, torch: str, archive: Path, folder: Path) -> tuple[bool, str]:
    """Whether one combination works, and in words.

    Args:
        python: interpreter that makes the environment.
        torch: exact version.
        archive: folder of an extracted archive that another torch has made.
        folder: where the environment goes; removed at the end.
    """
    venv = folder / "venv"
    setup = [str(python), "tools/setup_env.py", "--venv", str(venv), "--torch-version", torch]
    setup += ["--no-dev", "--no-kernels", "--fresh-torch"]
    inside = str(venv / "bin" / "python")
    convert = [inside, "-m", "serve", "archive", "serve/assets/second_demo.py"]
    convert += ["--checkpoint", "serve/assets/second_demo.pth", "--output-folder", str(folder / "store")]
    try:
        for command in (setup, convert, [inside, "-c", SMOKE, str(archive)]):
            ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
            if ran.returncode:
                said = (ran.stdout + ran.stderr).strip()
                missing = [line for line in said.splitlines() if any(text in line for text in NOT_OBTAINABLE)]
                return (
                    (True, f"not obtainable here: {missing[0][:160]}") if missing else (False, said[-2000:])
                )
        return True, f"works: {ran.stdout.strip().splitlines()[-1]}"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns 1 if a combination that could be set up does not work."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.check_range",
        description="Show the supported range of torch and Python at both ends.",
    )
    parser.add_argument(
        "--python", type=Path, metavar="FILE", help="only this interpreter (default: all found)"
    )
    parser.add_argument(
        "--torch", action="append", metavar="VERSION", help=f"only this (default: {', '.join(TORCHES)})"
    )
    args = parser.parse_args(argv)
    failed = False
    pythons = [(str(args.python), args.python)] if args.python else find_pythons()
    with tempfile.TemporaryDirectory(prefix="check-range-") as name:
        scratch = Path(name)
        made = [sys.executable, "-m", "serve", "archive", "serve/assets/second_demo.py"]
        made += ["--checkpoint", "serve/assets/second_demo.pth", "--output-folder", name]
        subprocess.run(made, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        shutil.unpack_archive(scratch / "second_demo.mar", scratch / "archive", "zip")
        for version, python in pythons:
            for torch in args.torch or TORCHES:
                began = time.monotonic()
                ok, what = check(python, torch, scratch / "archive", scratch / "run")
                failed |= not ok
                took = f"{time.monotonic() - began:.0f} s"
                print(
                    f"Python {version}, torch {torch}: {what if ok else 'FAILS: ' + what} ({took})",
                    flush=True,
                )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

"""Locked packages into the environment: by uv with pip's settings, or by pip.

uv is several times as fast as pip. pip fetches it (hash-checked) into ``uv/`` of the environment, and uv gets the
indexes, certificates and proxies that pip is configured with, so that every mirror of pip's works. If there is no uv
for this machine, or uv cannot read that index, pip installs the locks.
"""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tools.environment.venv import ROOT, SetupFailed, venv_python

__all__ = ["LOCKED", "PIP", "UV_FOLDER", "UV_VARIABLES", "install_lock", "pip", "uv_environment"]

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

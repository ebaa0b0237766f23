"""Client of `tools.bench.reference.worker`: start it in another Python, call it, end it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from serve.errors import InferenceFailed, SetupError

__all__ = ["ReferenceProcess", "child_environment"]

SCRIPT = Path(__file__).with_name("worker.py")
SHUTDOWN_S = 5.0
LAST_LINES = 12


class ReferenceProcess:
    """Worker process in another Python; a context manager that ends it."""

    def __init__(self, python: Path, threads: int) -> None:
        """Start `python`, which must have upstream's packages, with `threads` compute threads.

        Raises:
            SetupError: it cannot be started.
        """
        self.python = python
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        try:
            # -P: do not search the folder of the script for modules.
            self._process = subprocess.Popen(
                [str(python), "-P", str(SCRIPT)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                env=child_environment(OMP_NUM_THREADS=str(threads)),
            )
        except OSError as error:
            self._errors.close()
            raise SetupError(f"{python} cannot be started: {error.strerror}") from error

    @property
    def pid(self) -> int:
        """Process id of the worker."""
        return self._process.pid

    def call(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Send one command and wait for its answer.

        Raises:
            InferenceFailed: the command failed.
            SetupError: the process has exited, or its answer is not JSON.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": command, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise SetupError(self._log_tail())
        try:
            answer: dict[str, Any] = json.loads(line)
        except ValueError:
            raise SetupError(f"{self.python}: expected JSON, got {line[:200]!r}") from None
        if "error" in answer:
            raise InferenceFailed(f"{self.python}: {answer['error']}")
        return answer

    def close(self) -> None:
        """Close its standard input and wait; kill it if it does not exit in time."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(SHUTDOWN_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def kill(self) -> None:
        """Kill it at once."""
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> Self:
        """Return the process itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the process; after an error (Ctrl-C too) kill it first."""
        if error is not None:
            self.kill()
        self.close()

    def _log_tail(self) -> str:
        code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        tail = "\n".join(lines[-LAST_LINES:]) or "(empty)"
        return f"the native process ({self.python}) exited with code {code}; end of its log:\n{tail}"


def child_environment(**changes: str) -> dict[str, str]:
    """Return the environment for a child with another Python, without the paths of our packages."""
    # spconv's CPU wheel recompiles itself if it finds nvcc, which fails without a GPU.
    no_jit = {"SPCONV_DISABLE_JIT": "1", "CUMM_DISABLE_JIT": "1", "CUMM_CUDA_VERSION": ""}
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    return {**kept, **no_jit, **changes}

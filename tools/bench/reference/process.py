"""The process behind the native side of a benchmark: started, asked one thing at a time, and gone afterwards.

Knows the line protocol of `tools.bench.reference.worker`, not what is asked.
"""

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

__all__ = ["NativeProcess", "handed_on"]

SCRIPT = Path(__file__).with_name("worker.py")
FAREWELL_S = 5.0
LAST_LINES = 12


class NativeProcess:
    """A `native_side` in another Python. A context manager: no process is left when it is over."""

    def __init__(self, python: Path, threads: int) -> None:
        """Start `python`, which has upstream's packages, to compute with so many threads.

        Raises:
            SetupError: it cannot be started.
        """
        self.python = python
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        try:
            # -P: the folder of the script is not searched for modules.
            self._process = subprocess.Popen(
                [str(python), "-P", str(SCRIPT)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                env=handed_on(OMP_NUM_THREADS=str(threads)),
            )
        except OSError as error:
            self._errors.close()
            raise SetupError(f"{python} cannot be started: {error.strerror}") from error

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Have one command done and wait for it.

        Raises:
            InferenceFailed: it answered with an error.
            SetupError: it has ended, or says something else.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise SetupError(self._last_words())
        try:
            answer: dict[str, Any] = json.loads(line)
        except ValueError:
            raise SetupError(f"{self.python} answered no JSON: {line[:200]!r}") from None
        if "error" in answer:
            raise InferenceFailed(f"{self.python}: {answer['error']}")
        return answer

    def close(self) -> None:
        """End it: by the end of its input, or by force."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(FAREWELL_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def kill(self) -> None:
        """End it at once, in the middle of whatever it does."""
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the process; after an error (Ctrl-C too) without waiting for what it does."""
        if error is not None:
            self.kill()
        self.close()

    def _last_words(self) -> str:
        code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        said = "\n".join(lines[-LAST_LINES:]) or "nothing"
        return f"the native side ({self.python}) ended with exit code {code}; it said last:\n{said}"


def handed_on(**changes: str) -> dict[str, str]:
    """Our environment for a child with another Python: without what would show it our packages."""
    # spconv's wheel for CPUs builds itself anew where it finds nvcc, and fails at that without a GPU.
    as_is = {"SPCONV_DISABLE_JIT": "1", "CUMM_DISABLE_JIT": "1", "CUMM_CUDA_VERSION": ""}
    ours = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    return {**ours, **as_is, **changes}

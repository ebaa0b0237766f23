"""Client of the load generator: start its process, run loads, end it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from types import TracebackType
from typing import Self

from serve.errors import SetupError
from serve.torchserve.java import child_environment
from tools.bench.serving.load import Load, LoadResult

__all__ = ["LoadProcess"]


class LoadProcess:
    """Context manager around the process; one load at a time. The process exits when its input closes."""

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tools.bench.serving.load"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=child_environment(),
            start_new_session=True,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()

    @property
    def pid(self) -> int:
        """Process id of the load generator."""
        return self._process.pid

    def measure(self, load: Load) -> LoadResult:
        """Run a load and wait for the result.

        Raises:
            SetupError: the process has exited.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(asdict(load)) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise SetupError("the load generator exited; see its output above") from None
        line = self._process.stdout.readline()
        if not line:
            raise SetupError("the load generator exited; see its output above")
        return LoadResult(**json.loads(line))

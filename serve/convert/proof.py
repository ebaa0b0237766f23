"""Prove an archive in a fresh process that has what a server has, and nothing of this process.

The process (`serve.worker.proof`) starts while the conversion still computes, so that its imports cost no time of
their own on a second core.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from serve import errors
from serve.errors import ArchiveError, SelfTestError, SetupError
from serve.settings import Settings
from serve.settings.environment import child_environment

__all__ = ["FrameCost", "ProofProcess", "start_proof"]


@dataclass(frozen=True)
class FrameCost:
    """What the golden frame cost in the proving process, after a first frame that warmed it up.

    Attributes:
        seconds: decoding, network and postprocessing of one frame.
        device: ``cpu`` or ``cuda:N``.
        memory_bytes: largest resident memory of the process.
        device_memory_bytes: largest memory taken on the device; None on a CPU.
    """

    seconds: float
    device: str
    memory_bytes: int
    device_memory_bytes: int | None


class ProofProcess:
    """A process that waits for an archive to prove; made by `start_proof`."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        """Wrap a started process that writes what it prints into `log`."""
        self._process, self._log = process, log

    def prove(self, root: Path, device: Any, *, trust_code: bool) -> FrameCost:
        """Let the process load the unpacked archive and compare its golden frame.

        Args:
            root: folder of the unpacked archive.
            device: torch device to serve on.
            trust_code: whether to import modules packed in the archive.

        Raises:
            SetupError: the archive cannot be served; the message says why.
        """
        gpu_id = (device.index or 0) if device.type == "cuda" else None
        request = json.dumps({"root": str(root), "gpu_id": gpu_id, "trust_code": trust_code})
        with contextlib.suppress(BrokenPipeError):
            assert self._process.stdin is not None
            self._process.stdin.write(request + "\n")
            self._process.stdin.flush()
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SelfTestError(f"the process that proves the archive {self._describe_end()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            kind = getattr(errors, answer["error"], None)
            if isinstance(kind, type) and issubclass(kind, SetupError):
                raise kind(answer["message"])
            raise SelfTestError(
                f"the archive cannot be served: {answer['error']}: {answer['message']}{self._last_lines()}"
            )
        if opened := answer.pop("opened"):
            raise ArchiveError(
                f"the archive's code reads {', '.join(opened[:5])}, which is not packed and not on a server; put the "
                "file into the package, beside the code that reads it, and open it by a path relative to __file__"
            )
        return FrameCost(**answer)

    def _describe_end(self) -> str:
        code = self._process.wait()
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        hint = "; it may have run out of memory" if code == -signal.SIGKILL else ""
        return f"{how}{hint}{self._last_lines()}"

    def _last_lines(self) -> str:
        lines = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return f" (its last output: {' / '.join(lines[-3:])})" if lines else ""


def start_process(
    package: str, folder: Path, environment: Mapping[str, str], output: BinaryIO
) -> subprocess.Popen[str]:
    """Start `serve.worker.proof` in `folder`; what it prints goes to `output`."""
    return subprocess.Popen(
        [sys.executable, "-m", "serve.worker.proof", package],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=output,
        cwd=folder,
        env=environment,
        text=True,
        encoding="utf-8",
    )


@contextlib.contextmanager
def start_proof(package: str) -> Iterator[ProofProcess]:
    """Start a process that will prove an archive of a model of `package`; it ends with the block."""
    environment = child_environment(inherit_path=False)
    environment.pop("MMDET3D_SERVE_WORKER_SOCKETS", None)
    if not Settings.from_environment().trust_archive_code:
        environment["MMDET3D_SERVE_CONFINE"] = "1"  # as the process that starts TorchServe sets it
    with tempfile.TemporaryDirectory(prefix="mmdet3d-serve-proof-") as folder:
        log, elsewhere = Path(folder, "log"), Path(folder, "empty")
        elsewhere.mkdir()
        with (
            log.open("wb") as output,
            start_process(package, elsewhere, environment, output) as process,
        ):
            try:
                yield ProofProcess(process, log)
            finally:
                process.kill()

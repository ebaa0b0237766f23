"""Processes that prove an archive, forked from one that has imported already what each of them imports first.

Each conversion proves its archive in a process of its own (`serve.convert.proof`). Of the CPU time of a small model's
proof nine tenths are imports of torch, mmengine, mmdet and mmdet3d. A fork server has done these, and nothing else: it
has the environment of a proving process, has seen no archive, and has no thread. Each process forked from it runs the
whole of `serve.worker.proof`. Tests of the process itself start it anew (the marker ``fresh_proof``).
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from serve.settings.environment import child_environment

# The sockets keep messages apart; an environment is shorter.
LONGEST_REQUEST = 1 << 18


class ForkedProcess:
    """What `serve.convert.proof` uses of a `subprocess.Popen`, for a process that is not our child."""

    def __init__(self, pid: int, stdin: int, stdout: int, status: BinaryIO) -> None:
        self.pid, self.returncode = pid, None
        # Unlike its number, this cannot become another process's; it does not wait for anything yet.
        self._handle = os.pidfd_open(pid)
        self.stdin = os.fdopen(stdin, "w", encoding="utf-8")
        self.stdout = os.fdopen(stdout, encoding="utf-8")
        self._status = status

    def kill(self) -> None:
        """End the process, if it has not ended."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._handle, signal.SIGKILL)

    def wait(self) -> int:
        """Wait for the end; returns the exit status, or minus the signal's number."""
        if self.returncode is None:
            self.returncode = int(self._status.readline())
        return self.returncode

    def __enter__(self) -> ForkedProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            self.stdin.close()
        self.wait()
        self._status.close()
        os.close(self._handle)


class ForkServer:
    """A process that has imported `package`, and forks processes that prove an archive of a model of it."""

    def __init__(self, package: str) -> None:
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket, self._place = ours, tempfile.TemporaryDirectory(prefix="mmdet3d-serve-forks-")
        self._log, empty = Path(self._place.name, "log"), Path(self._place.name, "empty")
        empty.mkdir()
        with its, self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.fork_server", package, str(its.fileno())],
                stdin=subprocess.DEVNULL,
                stderr=log,
                cwd=empty,
                # OpenBLAS starts its threads at import; what computes for models has none before its first use.
                env={**child_environment(inherit_path=False), "OPENBLAS_NUM_THREADS": "1"},
                pass_fds=[its.fileno()],
                # Ctrl-C is for the tests, which end what they started; without a server they could not wait for it.
                start_new_session=True,
            )

    def start(self, folder: Path, environment: Mapping[str, str], output: BinaryIO) -> ForkedProcess:
        """As `serve.convert.proof.start_process`."""
        request = json.dumps({"folder": str(folder), "environment": dict(environment)}).encode()
        assert len(request) < LONGEST_REQUEST
        theirs_in, stdin = os.pipe()
        stdout, theirs_out = os.pipe()
        status, theirs_status = os.pipe()
        theirs = [theirs_in, theirs_out, output.fileno(), theirs_status]
        try:
            socket.send_fds(self._socket, [request], theirs)
        finally:
            for descriptor in (theirs_in, theirs_out, theirs_status):
                os.close(descriptor)
        told = os.fdopen(status, "rb")
        if not (pid := told.readline()):
            raise ChildProcessError(f"the fork server has ended:\n{self._log.read_text()}")
        return ForkedProcess(int(pid), stdin, stdout, told)

    def stop(self) -> None:
        """End the process, which ends by itself when ours does."""
        self._socket.close()
        self._process.wait()
        self._place.cleanup()


def main() -> None:
    """Import what a proof of the package named imports first; then fork for each request, until its sender ends."""
    package, requests = sys.argv[1], socket.socket(fileno=int(sys.argv[2]))
    from serve import ops

    ops.install()
    for name in ("serve.runtime", "serve.worker.handler", f"handlers.{package}_handler"):
        importlib.import_module(name)
    for name in ("models", "datasets.transforms", "structures"):
        importlib.import_module(f"{package}.{name}")
    assert len(os.listdir("/proc/self/task")) == 1, "a process with threads is no copy of itself after a fork"
    gc.collect()
    gc.freeze()  # a collection would copy every page that it looks at
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the system buries the processes that watch
    while True:
        message, descriptors, _, _ = socket.recv_fds(requests, LONGEST_REQUEST, 4)
        if not message:
            return
        if os.fork() == 0:
            requests.close()
            _watch(package, json.loads(message), *descriptors)
        for descriptor in descriptors:
            os.close(descriptor)


def _watch(
    package: str, request: dict[str, object], stdin: int, stdout: int, stderr: int, status: int
) -> None:
    """Fork the process that proves, write its number and, at its end, how it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if (pid := os.fork()) == 0:
        os.close(status)
        _prove(package, request, stdin, stdout, stderr)
    for descriptor in (stdin, stdout, stderr):
        os.close(descriptor)
    os.write(status, f"{pid}\n".encode())
    _, ended = os.waitpid(pid, 0)
    try:
        os.write(status, f"{os.waitstatus_to_exitcode(ended)}\n".encode())
    finally:
        os._exit(0)


def _prove(package: str, request: dict[str, object], *descriptors: int) -> None:
    """Become what ``python -m serve.worker.proof PACKAGE`` is in the folder and environment requested."""
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(str(request["folder"]))
    os.environ.clear()
    os.environ.update(request["environment"])
    tempfile.tempdir = None
    sys.path[0] = os.getcwd()
    sys.orig_argv = [sys.executable, "-m", "serve.worker.proof", package]
    sys.argv[1:] = [package]
    code = 1
    try:
        runpy.run_module("serve.worker.proof", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


if __name__ == "__main__":
    main()

"""The engine on Ray Data: parts are computed by Ray, on this machine or those of a cluster.

Ray lives in a process of its own (`serve.bulk.ray_driver`), which this one waits for. Ray ends the process that it is
imported in, without a word and with status 1, when a cluster's head is lost; it takes over signals, and prints. A pipe
tells all of that apart from a run that has ended.
"""

from __future__ import annotations

import hashlib
import importlib.util
import socket
import tempfile
from collections.abc import Callable, Iterator
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from serve import storage
from serve.bulk.destination import ARCHIVE, Destination
from serve.bulk.parts import Counts, Job, Part
from serve.bulk.ray_driver import LOCAL, Order, run_driver
from serve.bulk.ray_worker import pack_lines
from serve.errors import SettingsError, SetupError
from serve.settings.environment import ray_address
from serve.storage.hashes import sha256_of

__all__ = ["RayEngine"]

_CONTEXT = get_context("spawn")
_CONNECT_S = 5.0
_LONGEST_SCRATCH = 42  # the path of a socket has 107 characters, of which Ray adds 65
_END_S = 45.0  # Ray stops what computes, then its processes


class RayEngine:
    """Parts on Ray: one that is started on this machine and ends with the run, or a cluster.

    Args:
        address: host:port of a cluster's head, or ``auto`` for the cluster of this machine; None for what
            ``RAY_ADDRESS`` says, else a Ray of this machine alone.
        device: ``cpu`` or ``cuda``; None for GPUs if the cluster has some.
        actors: most actors; as many as there are cores or GPUs if None.
        archive_uri: URI of the job's archive, for machines of a cluster; without one they get a copy of the file.

    Raises:
        SettingsError: the address is no address, or of a kind that has not been tried.
        SetupError: Ray is not installed.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        device: str | None = None,
        actors: int | None = None,
        archive_uri: str | None = None,
    ) -> None:
        if importlib.util.find_spec("ray") is None:
            raise SetupError(
                "--engine ray needs Ray, which is not installed: pip install 'mmdet3d-serve[ray]'"
            )
        # Ray itself prefers RAY_ADDRESS to auto: in a job, auto means the job's cluster.
        self._address = (ray_address() if address in (None, "", "auto") else None) or address or LOCAL
        self._head = _head_of(self._address)
        self._device, self._actors, self._archive_uri = device, actors, archive_uri

    def compute(
        self, parts: Iterator[Part], job: Job, destination: Destination, advance: Callable[[int], None]
    ) -> Iterator[tuple[int, Counts]]:
        """See `Engine.compute`."""
        first = next(parts, None)
        if first is None:
            return
        if self._head is not None:
            _check_port(self._address, *self._head)
        order = self._order(job, destination)
        with tempfile.TemporaryDirectory(prefix="mmdet3d-ray-", ignore_cleanup_errors=True) as scratch:
            if self._address == LOCAL and len(scratch) > _LONGEST_SCRATCH:
                raise SetupError(
                    f"the temporary folder {tempfile.gettempdir()} has too long a path for Ray's sockets; set TMPDIR "
                    "to a shorter one, such as /tmp"
                )
            driver = _Driver(order, scratch)
            try:
                driver.send(chain((first,), parts))
                yield from driver.results(advance)
            finally:
                driver.end()

    def _order(self, job: Job, destination: Destination) -> Order:
        archive = Path(job.archive)
        uri = None if self._address == LOCAL else self._archive_uri or _share(archive, destination)
        return Order(
            address=self._address,
            job=job,
            archive_uri=uri,
            archive_sha256=sha256_of(archive),
            where=destination.where,
            run_sha256=hashlib.sha256(destination.read("bulk.json") or b"").hexdigest(),
            device=self._device,
            actors=self._actors,
        )


class _Driver:
    """The process in which Ray is."""

    def __init__(self, order: Order, scratch: str) -> None:
        self._connection, other = _CONTEXT.Pipe()
        self._process: Any = _CONTEXT.Process(
            target=run_driver, args=(other, order, scratch), daemon=True, name="bulk ray"
        )
        self._process.start()
        other.close()  # so that the end of the process ends the connection
        self._has_finished = False

    def send(self, parts: Iterator[Part]) -> None:
        """Hand over all parts; `results` raises if one is not taken."""
        try:
            for part in parts:
                self._connection.send((part.number, pack_lines(part.lines)))
            self._connection.send(None)
        except OSError:  # the process has ended, or failed
            return

    def results(self, advance: Callable[[int], None]) -> Iterator[tuple[int, Counts]]:
        """Yield number and counts of each finished part.

        Raises:
            ServeError: what has ended the run.
        """
        while not self._has_finished:
            try:
                name, *values = self._connection.recv()
            except (EOFError, OSError) as error:
                self._process.join(_END_S)
                raise SetupError(
                    f"the process that directs Ray has ended (status {self._process.exitcode}): the cluster's head was "
                    "lost, for which Ray waits a minute, or this machine's memory"
                ) from error
            if name == "failed":
                raise values[0]
            if name == "advance":
                advance(values[0])
            elif name == "done":
                yield values[0], Counts.of(values[1])
            else:
                self._has_finished = True

    def end(self) -> None:
        """Let the process end Ray, and wait for both."""
        self._connection.close()
        if not self._has_finished:
            self._process.terminate()
        self._process.join(_END_S)
        self._process.kill()
        self._process.join()
        self._process.close()


def _head_of(address: str) -> tuple[str, int] | None:
    """Split the address of a cluster's head; None for ``local`` and ``auto``.

    Raises:
        SettingsError: it is not ``host:port``.
    """
    if address in (LOCAL, "auto"):
        return None
    if "://" in address:
        raise SettingsError(
            f"Ray address {address}: give host:port of the cluster's head and run on one of its machines, or as a job "
            "of the cluster"
        )
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not (port.isascii() and port.isdecimal()) or not 0 < int(port) < 65536:
        raise SettingsError(
            f"Ray address {address!r} (--ray-address or RAY_ADDRESS) is not host:port, auto or local"
        )
    return host, int(port)


def _check_port(address: str, host: str, port: int) -> None:
    """Connect to a port and close it again: Ray itself asks for minutes where nothing listens.

    Raises:
        SetupError: nothing listens there.
    """
    try:
        socket.create_connection((host, port), timeout=_CONNECT_S).close()
    except OSError as error:
        raise SetupError(
            f"no Ray cluster answers at {address}: {error.strerror or error}; give the port of its GCS (ray start "
            "--head prints it)"
        ) from error


def _share(archive: Path, destination: Destination) -> str:
    """Put the archive beside the results, where every machine of a cluster finds it; returns its URI."""
    uri = destination.uri(ARCHIVE)
    if not storage.exists(uri):
        storage.upload(archive, uri, progress=False)
    return uri

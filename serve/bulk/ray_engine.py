"""The engine on Ray Data: actors on this machine, or on those of a cluster, that compute parts.

A part is a row of a data set, and `map` with a pool of actors is what computes it. Ray Data starts the actors, hands
each the next part, starts lost ones again elsewhere and hands them the part that they had; results go from an actor
straight to the destination, and only counts come back.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import secrets
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import replace
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any, Self

import orjson

from serve import storage
from serve.bulk.destination import ARCHIVE, Destination
from serve.bulk.parts import Counts, Job, Part
from serve.bulk.ray_worker import Board, PartWorker, Task, error_of, pack_lines
from serve.errors import SettingsError, SetupError
from serve.settings.environment import ray_address, variable_set
from serve.storage.hashes import sha256_of
from serve.worker.cpu_quota import available_cores

__all__ = ["RayEngine"]

_SHOW_S = 0.5
_END_S = 30.0
_LOOPBACK = "127.0.0.1"
_STORE_BYTES = 256 << 20  # of a Ray that the run starts: the manifest's lines, compressed
# Read by Ray when it is imported or started.
_VARIABLES = {
    "RAY_USAGE_STATS_ENABLED": "0",  # Ray reports to its makers otherwise
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # how Ray is to behave from some version on; it warns without
}


class _Discard(StringIO):
    def write(self, text: str) -> int:
        return len(text)


class RayEngine:
    """Parts on Ray: one that is started on this machine and ends with the run, or a cluster.

    Args:
        address: host:port of a cluster's head, or ``auto`` for the cluster of this machine; None for what
            ``RAY_ADDRESS`` says, else a Ray of this machine alone.
        device: ``cpu`` or ``cuda``; None for GPUs if the cluster has some.
        actors: most actors; as many as there are cores or GPUs if None.
        archive_uri: URI of the job's archive, for machines of a cluster; without one they get a copy of the file.

    Raises:
        SettingsError: the address is of a kind that has not been tried.
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
        self._address = address or ray_address() or "local"
        if "://" in self._address:
            raise SettingsError(
                f"--ray-address {self._address}: give host:port of the cluster's head and run on one of its machines, "
                "or as a job of the cluster"
            )
        self._device, self._actors, self._archive_uri = device, actors, archive_uri

    def compute(
        self, parts: Iterator[Part], job: Job, destination: Destination, advance: Callable[[int], None]
    ) -> Iterator[tuple[int, Counts]]:
        """See `Engine.compute`."""
        rows = [{"number": part.number, "lines": pack_lines(part.lines)} for part in parts]
        if not rows:
            return
        with ExitStack() as stack:
            ray = self._connect(stack)
            task, size, resources = self._plan(ray, job, destination, len(rows))
            # On the machine of this process: it lives as long as the run does.
            board = ray.remote(num_cpus=0)(Board).options(scheduling_strategy=_here(ray)).remote()
            pool = ray.data.ActorPoolStrategy(
                min_size=1,
                initial_size=size,
                max_size=self._actors or (None if self._address != "local" else size),
                max_tasks_in_flight_per_actor=2,
            )
            dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
                PartWorker, fn_constructor_args=(task, board), compute=pool, **resources
            )
            del rows
            # Without reading ahead, which would go on in a thread after the iterator is closed.
            batches = iter(dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0))
            stack.callback(_end, batches)
            watch = stack.enter_context(_Watch(ray, board, advance))
            for batch in batches:
                watch.show()
                for row in batch.to_pylist():
                    if row["error"]:
                        raise error_of(row["error"])
                    yield row["number"], Counts.of(orjson.loads(row["counts"]))

    def _connect(self, stack: ExitStack) -> Any:
        """Import Ray and start or join it, quietly, until the stack is left.

        Raises:
            SetupError: no cluster answers, or Ray cannot be started.
        """
        alone = self._address == "local"
        for name, value in {**_VARIABLES, **(_variables_alone() if alone else {})}.items():
            stack.enter_context(variable_set(name, value))
        # Ray prints what it hears from its machines, lost ones with pages of their logs. This command prints nothing.
        stack.enter_context(redirect_stdout(_Discard()))
        import ray
        import ray.data

        logging.getLogger("ray").setLevel(logging.ERROR)
        started: dict[str, Any] = {}
        if alone:
            folder = tempfile.mkdtemp(prefix="mmdet3d-ray-")
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            started = {
                "num_cpus": available_cores(),
                "object_store_memory": _STORE_BYTES,
                "include_dashboard": False,
                "_node_ip_address": _LOOPBACK,
                "_temp_dir": folder,
            }
        # Ray takes over SIGTERM, which has to end this run as Ctrl-C does.
        former = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        stack.callback(ray.shutdown)
        try:
            with _discard_stderr():  # one line says that a variable has set the level of the others
                ray.init(address=self._address, log_to_driver=False, logging_level=logging.ERROR, **started)
        except (ConnectionError, OSError, RuntimeError, ValueError) as error:
            where = "Ray cannot be started" if started else f"no Ray cluster answers at {self._address}"
            raise SetupError(
                f"{where}: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
            ) from error
        finally:
            if threading.current_thread() is threading.main_thread():
                for number, handler in former.items():
                    signal.signal(number, handler)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        for name in ("ray", "ray.data"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        return ray

    def _plan(
        self, ray: Any, job: Job, destination: Destination, parts: int
    ) -> tuple[Task, int, dict[str, Any]]:
        """Decide what an actor gets and how many there are at first."""
        found = ray.cluster_resources()
        cores, gpus = int(found.get("CPU", 0)), int(found.get("GPU", 0))
        on_gpu = gpus > 0 if self._device is None else self._device != "cpu"
        places = gpus if on_gpu else cores
        threads = max(1, cores // max(1, gpus)) if on_gpu else 1
        size = max(1, min(self._actors or places, places, parts))
        archive = Path(job.archive)
        sha256 = sha256_of(archive)
        if self._address != "local":
            job = replace(job, archive=self._archive_uri or _share(archive, destination))
        description = destination.read("bulk.json") or b""
        task = Task(
            job,
            sha256,
            destination.where,
            hashlib.sha256(description).hexdigest(),
            "cuda:0" if on_gpu else "cpu",
            threads,
        )
        return task, size, {"num_cpus": 1, "num_gpus": 1} if on_gpu else {"num_cpus": 1}


@cache  # Ray keeps the first token for the life of the process
def _variables_alone() -> dict[str, str]:
    """Variables of a Ray of this run: its ports, which take code to run, are on loopback and want a token."""
    loopback = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    if "ray" in sys.modules:  # which reads the token when it is imported, and would not have this one
        return loopback
    return {**loopback, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


class _Watch:
    """Reports the frames that are begun, also while nothing is finished, from a thread; a context manager."""

    def __init__(self, ray: Any, board: Any, advance: Callable[[int], None]) -> None:
        self._ray, self._board, self._advance = ray, board, advance
        self._shown = 0
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def show(self) -> None:
        """Report now.

        Raises:
            ServeError: what reporting has raised, also in the thread.
        """
        with self._lock:
            if self._error is not None:
                raise self._error
            begun = self._ray.get(self._board.begun.remote())
            self._advance(begun - self._shown)
            self._shown = begun

    def _run(self) -> None:
        while not self._ended.wait(_SHOW_S):
            try:
                self.show()
            except Exception as error:
                self._error = error
                return

    def __enter__(self) -> Self:
        """Report from now on."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Wait for the thread."""
        self._ended.set()
        self._thread.join()


def _end(batches: Any) -> None:
    """Stop what computes a data set, and wait for the thread that directs it: it ends the process if Ray is gone."""
    batches.close()
    for thread in threading.enumerate():
        if thread.name.startswith("StreamingExecutor"):
            thread.join(_END_S)


@contextmanager
def _discard_stderr() -> Iterator[None]:
    """Discard what is written to standard error in the block, by whatever language."""
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(null)
        os.close(kept)


def _share(archive: Path, destination: Destination) -> str:
    """Put the archive beside the results, where every machine of a cluster finds it; returns its URI."""
    uri = destination.uri(ARCHIVE)
    if not storage.exists(uri):
        storage.upload(archive, uri, progress=False)
    return uri


def _here(ray: Any) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)

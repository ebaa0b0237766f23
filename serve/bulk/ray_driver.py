"""The process that directs Ray for a run: starts or joins it, hands it the parts, and passes on what is finished.

A part is a row of a data set, and `map` with a pool of actors is what computes it. Ray Data starts the actors, hands
each the next part, starts lost ones again elsewhere and hands them the part that they had; results go from an actor
straight to the destination, and only counts come back.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import signal
import threading
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from multiprocessing import parent_process
from multiprocessing.connection import Connection
from typing import Any, Self

import orjson
import psutil

from serve.bulk.parts import Job
from serve.bulk.processes import Sender, end_with_parent
from serve.bulk.ray_worker import Board, PartWorker, Task, error_of
from serve.errors import ServeError, SetupError
from serve.settings.environment import variable_set
from serve.worker.cpu_quota import available_cores

__all__ = ["LOCAL", "Order", "run_driver"]

#: Address of a Ray of this run alone.
LOCAL = "local"
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
# Of a cluster that the run joins: Ray asks twenty times for half a minute each otherwise.
_VARIABLES_JOINED = {"RAY_gcs_server_port_wait_time_s": "1"}
# Of a Ray of this run. Its ports, which take code to run, are on loopback. Without its memory monitor, which kills the
# processes that began last, several at once: the system kills the one that takes most.
_VARIABLES_ALONE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_memory_monitor_refresh_ms": "0"}


@dataclass(frozen=True)
class Order:
    """What to compute, and on which Ray.

    Attributes:
        address: of the cluster: host:port, ``auto``, or `LOCAL`.
        job: what every part needs.
        archive_uri: where the machines of a cluster find the job's archive; None for its path.
        archive_sha256: hash of the archive.
        where: folder or bucket of the results.
        run_sha256: hash of the run's description there.
        device: ``cpu`` or ``cuda``; None for GPUs if the cluster has some.
        actors: most actors; as many as there are cores or GPUs if None.
    """

    address: str
    job: Job
    archive_uri: str | None
    archive_sha256: str
    where: str
    run_sha256: str
    device: str | None
    actors: int | None


def run_driver(connection: Connection[Any, Any], order: Order, scratch: str) -> None:
    """Take parts from the connection until a None, and compute them.

    Sends ``("advance", frames)``, ``("done", number, figures)`` for a part, and at last ``("finished",)`` or
    ``("failed", error)``. SIGTERM ends it and the Ray that it has started.

    Args:
        connection: to the process that waits.
        order: what to compute.
        scratch: folder for Ray's files, removed with the process that waits.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits for this one
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    threading.Thread(target=_end_with_parent, args=(scratch,), daemon=True).start()
    _discard_output()
    send = Sender(connection)
    with ExitStack() as stack:
        try:
            ray = _connect(order, scratch, stack)
            rows = list(iter(connection.recv, None))
            _compute(ray, rows, order, scratch, send, stack)
        except KeyboardInterrupt:
            return
        except Exception as error:
            own = isinstance(error, ServeError)
            send("failed", error if own else SetupError(f"Ray cannot compute the parts: {_reasons(error)}"))
        else:
            send("finished")


def _end_with_parent(scratch: str) -> None:
    """End a Ray of this run when the process that waits was killed, then as processes of the local engine."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    children = psutil.Process().children(recursive=True)
    for each in children:
        with suppress(psutil.Error):
            each.suspend()
    # Before they are killed: they write nothing more, and Ray ends this process as soon as it misses them.
    shutil.rmtree(scratch, ignore_errors=True)
    for each in children:  # Ray's agents would look for their raylet for a minute
        with suppress(psutil.Error):
            each.kill()
    end_with_parent(scratch)


def _compute(
    ray: Any, rows: list[tuple[int, bytes]], order: Order, scratch: str, send: Sender, stack: ExitStack
) -> None:
    task, size, resources = _plan(ray, order, len(rows))
    # On the machine of this process: it lives as long as the run does, though perhaps in several processes.
    board = (
        ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Board)
        .options(scheduling_strategy=_here(ray))
        .remote(os.path.join(scratch, "journal"))
    )
    pool = ray.data.ActorPoolStrategy(
        min_size=1,
        initial_size=size,
        max_size=order.actors or (None if order.address != LOCAL else size),
        max_tasks_in_flight_per_actor=2,
    )
    items = [{"number": number, "lines": lines} for number, lines in rows]
    rows.clear()
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map(
        PartWorker, fn_constructor_args=(task, board), compute=pool, **resources
    )
    del items
    # Without reading ahead, which would go on in a thread after the iterator is closed.
    batches = iter(dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0))
    stack.callback(_end, batches)
    watch = stack.enter_context(_Watch(ray, board, send))
    for batch in batches:
        watch.show()
        for row in batch.to_pylist():
            if row["error"]:
                raise error_of(row["error"])
            send("done", row["number"], orjson.loads(row["counts"]))


def _connect(order: Order, scratch: str, stack: ExitStack) -> Any:
    """Import Ray and start or join it, until the stack is left.

    Raises:
        SetupError: no cluster answers, or Ray cannot be started.
    """
    variables, started = _VARIABLES_JOINED, dict[str, Any]()
    if order.address == LOCAL:
        variables = {**_VARIABLES_ALONE, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        started = {
            "num_cpus": available_cores(),
            "object_store_memory": _STORE_BYTES,
            "include_dashboard": False,
            "_node_ip_address": _LOOPBACK,
            "_temp_dir": scratch,
        }
    for name, value in {**_VARIABLES, **variables}.items():
        stack.enter_context(variable_set(name, value))
    import ray
    import ray.data

    # Ray takes over SIGTERM, which has to end this process as it ended it before.
    former = signal.getsignal(signal.SIGTERM)
    stack.callback(ray.shutdown)
    try:
        ray.init(address=order.address, log_to_driver=False, logging_level=logging.ERROR, **started)
    except Exception as error:  # Ray has no common class for what it raises here
        if started:
            raise SetupError(f"Ray cannot be started: {_reasons(error)}") from error
        raise SetupError(
            f"the Ray cluster at {order.address} cannot be joined: {_reasons(error)}; run on one of its machines, or "
            "as its job"
        ) from error
    finally:
        signal.signal(signal.SIGTERM, former)
    ray.data.DataContext.get_current().enable_progress_bars = False
    return ray


def _plan(ray: Any, order: Order, parts: int) -> tuple[Task, int, dict[str, Any]]:
    """Decide what an actor gets and how many there are at first."""
    found = ray.cluster_resources()
    cores, gpus = int(found.get("CPU", 0)), int(found.get("GPU", 0))
    on_gpu = gpus > 0 if order.device is None else order.device != "cpu"
    places = gpus if on_gpu else cores
    threads = max(1, cores // max(1, gpus)) if on_gpu else 1
    size = max(1, min(order.actors or places, places, parts))
    job = order.job if order.archive_uri is None else replace(order.job, archive=order.archive_uri)
    device = "cuda:0" if on_gpu else "cpu"
    task = Task(job, order.archive_sha256, order.where, order.run_sha256, device, threads)
    return task, size, {"num_cpus": 1, "num_gpus": 1} if on_gpu else {"num_cpus": 1}


class _Watch:
    """Tells of the frames that are begun, also while nothing is finished, from a thread; a context manager."""

    def __init__(self, ray: Any, board: Any, send: Sender) -> None:
        self._ray, self._board, self._send = ray, board, send
        self._shown = 0
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def show(self) -> None:
        """Tell now."""
        with self._lock:
            begun = self._ray.get(self._board.begun.remote())
            self._send("advance", begun - self._shown)
            self._shown = begun

    def _run(self) -> None:
        while not self._ended.wait(_SHOW_S):
            self.show()

    def __enter__(self) -> Self:
        """Tell from now on."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Wait for the thread."""
        self._ended.set()
        self._thread.join(_END_S)


def _end(batches: Any) -> None:
    """Stop what computes a data set, and wait for the thread that directs it: it ends the process if Ray is gone."""
    batches.close()
    for thread in threading.enumerate():
        if thread.name.startswith("StreamingExecutor"):
            thread.join(_END_S)


def _reasons(error: BaseException) -> str:
    """Return a line of an error and of each that caused it; Ray packs whole tracebacks into messages."""
    found: list[str] = []
    link: BaseException | None = error
    while link is not None:
        lines = str(link).strip().splitlines() or [type(link).__name__]
        found.append(lines[-1 if "Traceback" in lines[0] else 0])
        link = link.__cause__
    return ": ".join(dict.fromkeys(found))


def _discard_output() -> None:
    """Discard what is written to standard output and error, by whatever language: Ray prints pages of its logs."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    os.close(null)


def _here(ray: Any) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)

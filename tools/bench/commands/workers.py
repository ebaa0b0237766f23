"""``python -m tools.bench workers``: how workers and threads divide the cores, through the service and without it.

For each division of the cores, as many processes of the runtime as workers run one frame in batches, alone; then
TorchServe with these workers, and a gateway in front of them, answer clients that never pause. Prints a table, then one
line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

from tqdm import tqdm

from serve.torchserve import ServedModel, TorchServe, TorchServeOptions
from serve.torchserve.process import KEY_FILE
from serve.worker.cpu_quota import available_cores
from tools.bench.serving.load import Load
from tools.bench.serving.load_process import LoadProcess
from tools.bench.serving.process import ManagedProcess
from tools.bench.serving.targets import free_ports

__all__ = ["main"]

BATCH = 8
_READY_S = 120.0
_THREADS = "MMDET3D_SERVE_THREADS"


@dataclass(frozen=True)
class Division:
    """One division of the cores: frames per second of the runtime alone and of the whole service."""

    workers: int
    threads: int
    alone: float
    served: float
    p50_ms: float | None
    failed: int


def main(argv: Sequence[str] | None) -> int:
    """Measure and print; 0 if no request failed."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench workers", description=__doc__)
    parser.add_argument("archive", type=Path, help="archive to serve, FILE.mar")
    parser.add_argument("frame", type=Path, help="file with one frame, sent again and again")
    parser.add_argument(
        "--seconds", type=float, default=15.0, help="length of each measurement (default: 15)"
    )
    parser.add_argument(
        "--clients", type=int, default=4 * BATCH, help=f"clients of the service (default: {4 * BATCH})"
    )
    args = parser.parse_args(argv)
    cores = available_cores()
    divisions = [(n, cores // n) for n in range(1, cores + 1) if cores % n == 0]
    if cores > 1:
        divisions.append((cores, cores))  # every worker takes all cores that it finds idle
    rows = []
    for workers, threads in tqdm(divisions, unit="division"):
        alone = _run_alone(args.archive, args.frame, workers, threads, args.seconds)
        with _served(args.archive, workers, threads) as (port, path), LoadProcess() as clients:
            load = Load("127.0.0.1", port, path, str(args.frame.resolve()), clients=args.clients)
            while not clients.measure(load).answered:
                pass  # until the gateway has read the descriptions
            found = clients.measure(
                Load(**{**asdict(load), "seconds": args.seconds, "warmup_s": 3.0, "max_requests": 10**9})
            )
        # Clients never pause, so that some requests are on their way when the measurement ends.
        failed = found.failed - found.failures.get("unanswered", 0)
        rows.append(Division(workers, threads, alone, found.rate, found.p50_ms, failed))
    print(
        f"{args.archive.name}, {args.frame.name}: {cores} cores, {args.clients} clients, batches up to {BATCH}"
    )
    print("| workers | threads | runtime alone, frames/s | served, frames/s | share | p50 ms | failed |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for row in rows:
        p50 = "–" if row.p50_ms is None else f"{row.p50_ms:.0f}"
        print(
            f"| {row.workers} | {row.threads} | {row.alone:.2f} | {row.served:.2f} | {row.served / row.alone:.2f} "
            f"| {p50} | {row.failed} |"
        )
    print(
        json.dumps(
            {"workers": {"archive": args.archive.name, "cores": cores, "rows": [asdict(r) for r in rows]}}
        )
    )
    return int(any(row.failed for row in rows))


def _run_alone(archive: Path, frame: Path, workers: int, threads: int, seconds: float) -> float:
    """Return frames per second of `workers` processes of the runtime side by side."""
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(archive) as file:
            file.extractall(folder)
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            runs = [pool.submit(_run, folder, str(frame), threads, seconds) for _ in range(workers)]
            return sum(run.result() for run in runs)


def _run(folder: str, frame: str, threads: int, seconds: float) -> float:
    """Run batches of one frame for some time, in a process of its own; returns frames per second."""
    from serve import ops

    ops.install("portable")
    import torch

    from serve.archive import open_directory
    from serve.protocol.options import FrameOptions
    from serve.runtime import load_detector
    from serve.runtime.malloc import disable_malloc_trim
    from serve.settings import Limits

    disable_malloc_trim()
    torch.set_num_threads(threads)
    detector = load_detector(open_directory(Path(folder)), torch.device("cpu"))
    body = Path(frame).read_bytes()
    done = 0
    started = 0.0
    while not started or time.perf_counter() - started < seconds:
        frames = [detector.decode(body, FrameOptions(), Limits()) for _ in range(BATCH)]
        detector.run(frames)
        if not started:  # the first batch compiles and fills caches
            started = time.perf_counter()
        else:
            done += BATCH
    return done / (time.perf_counter() - started)


@contextmanager
def _served(archive: Path, workers: int, threads: int) -> Iterator[tuple[int, str]]:
    """Serve an archive; yields the gateway's port and the path for predictions."""
    before = os.environ.get(_THREADS)
    os.environ[_THREADS] = str(threads)
    try:
        inference, management, metrics = free_ports(3)
        options = TorchServeOptions(
            archive.resolve().parent,
            [ServedModel(archive.name, name="model", workers=workers)],
            inference_port=inference,
            management_port=management,
            metrics_port=metrics,
            system_metrics=False,
        )
        with TorchServe(options) as server:
            command = [sys.executable, "-m", "serve", "gateway", "--port", "0", "--log-level", "warning"]
            command += ["--inference-url", server.inference_url, "--management-url", server.management_url]
            command += ["--worker-sockets", str(server.worker_sockets), "--client-share", "1.0"]
            command += ["--batch-frames", str(BATCH)]
            if server.tokens() and server.run_dir is not None:
                command += ["--backend-key-file", str(server.run_dir / KEY_FILE)]
            with ManagedProcess("the gateway", command) as gateway:
                yield (
                    int(gateway.wait_for("gateway      ", _READY_S).rpartition(":")[2]),
                    "/predictions/model",
                )
    finally:
        if before is None:
            del os.environ[_THREADS]
        else:
            os.environ[_THREADS] = before

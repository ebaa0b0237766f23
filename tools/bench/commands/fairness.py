"""``python -m tools.bench fairness``: one model of a gateway under a flood of requests for another.

Both are the sleep model, each with one worker of one TorchServe. A single client asks the quiet one, first alone, then
while more clients than the gateway admits frames ask the busy one. Prints a table, then one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from serve.torchserve import ServedModel, TorchServe, TorchServeOptions
from serve.torchserve.process import KEY_FILE
from tools.bench.serving.load import Load, LoadResult
from tools.bench.serving.load_process import LoadProcess
from tools.bench.serving.process import ManagedProcess
from tools.bench.serving.targets import free_ports, sleep_archive

__all__ = ["main"]

BUSY, QUIET = "busy", "quiet"
PENDING_FRAMES = 64
_READY_S = 60.0


def main(argv: Sequence[str] | None) -> int:
    """Measure and print; 0 if the quiet model answered every request."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench fairness", description=__doc__)
    parser.add_argument("--seconds", type=float, default=4.0, help="length of each load (default: 4)")
    parser.add_argument("--clients", type=int, default=128, help="clients of the busy model (default: 128)")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        rows = _measure(Path(folder), args.seconds, args.clients)
    print(
        f"{args.clients} clients for one model, {PENDING_FRAMES} frames pending at most; one client for the other"
    )
    print(
        "| model | answered | refused | p50 ms | p99 ms | frames/s |\n| --- | ---: | ---: | ---: | ---: | ---: |"
    )
    for name, row in rows.items():
        p50, p99 = (f"{value:.1f}" if value is not None else "–" for value in (row.p50_ms, row.p99_ms))
        print(f"| {name} | {row.answered} | {row.failed} | {p50} | {p99} | {row.rate:.1f} |")
    print(json.dumps({name: row.__dict__ for name, row in rows.items()}))
    return int(rows["quiet, beside the flood"].failed > 0)


def _measure(folder: Path, seconds: float, clients: int) -> dict[str, LoadResult]:
    archive = sleep_archive(folder)
    inference, management, metrics = free_ports(3)
    models = [ServedModel(archive.name, name=BUSY), ServedModel(archive.name, name=QUIET)]
    options = TorchServeOptions(
        folder,
        models[:1],
        inference_port=inference,
        management_port=management,
        metrics_port=metrics,
        system_metrics=False,
    )
    body = folder / "frame.bin"
    body.write_bytes(bytes(16_000))
    with TorchServe(options) as server, LoadProcess() as one, LoadProcess() as many:
        server.register(models[1])
        command = [sys.executable, "-m", "serve", "gateway", "--port", "0", "--log-level", "warning"]
        command += ["--inference-url", server.inference_url, "--management-url", server.management_url]
        command += ["--worker-sockets", str(server.worker_sockets)]
        if server.tokens() and server.run_dir is not None:
            command += ["--backend-key-file", str(server.run_dir / KEY_FILE)]
        # All clients are on one address here; their share is not what is measured.
        command += ["--max-pending-frames", str(PENDING_FRAMES), "--client-share", "1.0"]
        with ManagedProcess("the gateway", command) as gateway:
            port = int(gateway.wait_for("gateway      ", _READY_S).rpartition(":")[2])
            quiet = Load("127.0.0.1", port, f"/predictions/{QUIET}", str(body), clients=1, seconds=seconds)
            flood = replace(quiet, path=f"/predictions/{BUSY}", clients=clients, seconds=seconds + 1.0)
            while not one.measure(replace(quiet, seconds=0.5)).answered:
                pass  # until the gateway has read the descriptions
            alone = one.measure(quiet)
            with ThreadPoolExecutor(1) as background:
                flooding = background.submit(many.measure, replace(flood, max_requests=10**9))
                beside = one.measure(quiet)
                busy = flooding.result()
    return {"quiet, alone": alone, "quiet, beside the flood": beside, "busy": busy}

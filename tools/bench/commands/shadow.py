"""``python -m tools.bench shadow``: what shadow traffic costs the requests that it copies, in turns.

Two versions of the sleep model, whose answers have 40 boxes, each with one worker of one TorchServe. Three gateways in
front of it, one without a shadow and two with the shares 0.1 and 1, are asked in turns: 100 requests per second, and
64 clients. Prints a table with the medians over the rounds and, in brackets, their range; then one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import tempfile
import urllib.request
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from serve.torchserve import ServedModel, TorchServe, TorchServeOptions
from serve.torchserve.process import KEY_FILE
from tools.bench.serving.load import Load, LoadResult
from tools.bench.serving.load_process import LoadProcess
from tools.bench.serving.process import ManagedProcess
from tools.bench.serving.targets import free_ports, sleep_archive

__all__ = ["main"]

SHARES = (0.0, 0.1, 1.0)
_FRAME_BYTES = 276_000
_READY_S = 60.0
Rounds = dict[float, list[tuple[LoadResult, LoadResult]]]


def main(argv: Sequence[str] | None) -> int:
    """Measure and print; 0 if every request was answered."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench shadow", description=__doc__)
    parser.add_argument("--seconds", type=float, default=4.0, help="length of each load (default: 4)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds (default: 3)")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        rounds, counts = _measure(Path(folder), args.seconds, args.rounds)
    print(
        "| share | Poisson p50 ms | p99 ms | 64 clients frames/s | compared | dropped |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: |"
    )
    failed = 0
    for share, results in rounds.items():
        columns = [
            [paced.p50_ms or 0.0 for paced, _ in results],
            [paced.p99_ms or 0.0 for paced, _ in results],
            [closed.rate for _, closed in results],
        ]
        compared, dropped = counts[share]
        cells = " | ".join(f"{statistics.median(c):.1f} ({min(c):.1f}–{max(c):.1f})" for c in columns)
        print(f"| {share:g} | {cells} | {compared:.0f} | {dropped:.0f} |")
        failed += sum(paced.failed + closed.failed for paced, closed in results)
    document = {
        str(share): [[paced.__dict__, closed.__dict__] for paced, closed in results]
        for share, results in rounds.items()
    }
    print(json.dumps(document))
    return int(failed > 0)


def _measure(folder: Path, seconds: float, rounds: int) -> tuple[Rounds, dict[float, tuple[float, float]]]:
    archives = [
        sleep_archive(folder, version, "tools.bench.serving.boxes_handler") for version in ("1.0", "2.0")
    ]
    inference, management, metrics = free_ports(3)
    options = TorchServeOptions(
        folder,
        [ServedModel(archives[0].name)],
        inference_port=inference,
        management_port=management,
        metrics_port=metrics,
        system_metrics=False,
    )
    body = folder / "frame.bin"
    body.write_bytes(bytes(_FRAME_BYTES))
    results: Rounds = {share: [] for share in SHARES}
    with TorchServe(options) as server, LoadProcess() as process, ExitStack() as stack:
        server.register(ServedModel(archives[1].name))
        ports = {share: _start_gateway(stack, server, share) for share in SHARES}
        for _ in range(rounds):
            for share, port in ports.items():
                paced = Load("127.0.0.1", port, "/predictions/sleep", str(body), rate=100.0, seconds=seconds)
                paced = replace(paced, expect={"bytes": _FRAME_BYTES})
                closed = replace(paced, rate=0.0, clients=64)
                results[share].append((process.measure(paced), process.measure(closed)))
        counts = {
            share: (_count(port, "shadow_frames_total"), _count(port, "shadow_dropped_frames_total"))
            for share, port in ports.items()
        }
    return results, counts


def _start_gateway(stack: ExitStack, server: TorchServe, share: float) -> int:
    command = [sys.executable, "-m", "serve", "gateway", "--port", "0", "--log-level", "warning"]
    command += ["--inference-url", server.inference_url, "--management-url", server.management_url]
    command += ["--worker-sockets", str(server.worker_sockets), "--client-share", "1.0"]
    if server.tokens() and server.run_dir is not None:
        command += ["--backend-key-file", str(server.run_dir / KEY_FILE)]
    if share:
        command += ["--shadow", f"sleep:2.0={share:g}"]
    gateway = stack.enter_context(ManagedProcess("the gateway", command))
    return int(gateway.wait_for("gateway      ", _READY_S).rpartition(":")[2])


def _count(port: int, name: str) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return sum(
        float(value) for value in re.findall(rf"^mmdet3d_serve_{name}\{{.*\}} (\S+)$", text, re.MULTILINE)
    )

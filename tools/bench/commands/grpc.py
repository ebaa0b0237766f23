"""``python -m tools.bench grpc``: the Open Inference Protocol over HTTP and over gRPC, in pairs.

One gateway with both ports in front of one TorchServe that serves the demo SECOND. Clients that never pause send the
demonstration's frame as a binary tensor: by HTTP, by unary calls and by one stream, in alternating rounds. Prints a
table, then one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import orjson

from serve.cli.entry import bounded
from serve.torchserve import ServedModel, TorchServe, TorchServeOptions
from serve.torchserve.process import KEY_FILE
from tools.bench.serving.load import Load, LoadResult
from tools.bench.serving.load_process import LoadProcess
from tools.bench.serving.process import ManagedProcess, cpu_seconds
from tools.bench.serving.targets import free_ports

__all__ = ["main"]

_READY_S = 120.0
_HTTP = "HTTP"


@dataclass(frozen=True)
class Row:
    """What one protocol and number of clients gave, over all rounds.

    Attributes:
        protocol: name in the table.
        clients: clients that never pause.
        rate: frames per second, median of the rounds.
        p50_ms, p99_ms: latency, median of the rounds.
        ratio: median over the rounds of the rate, divided by that of HTTP in the same round.
        gateway_ms: CPU time of the gateway per frame, milliseconds.
        failed: requests without a correct response.
    """

    protocol: str
    clients: int
    rate: float
    p50_ms: float
    p99_ms: float
    ratio: float
    gateway_ms: float
    failed: int


def main(argv: Sequence[str] | None) -> int:
    """Measure and print; 0 if no request failed."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench grpc", description=__doc__)
    parser.add_argument("--seconds", type=float, default=4.0, help="length of each load (default: 4)")
    parser.add_argument("--rounds", type=bounded(int, 1, 20), default=3, help="rounds (default: 3)")
    parser.add_argument(
        "--clients", type=bounded(int, 1, 256), nargs="+", default=[1, 16], help="clients (default: 1 16)"
    )
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="mmdet3d-serve-bench-") as folder:
        rows = _measure(Path(folder), args.clients, args.rounds, args.seconds)
    print(f"demo SECOND, frame of 15528 points (248 kB), {args.rounds} rounds of {args.seconds:g} s")
    print("| protocol | clients | frames/s | to HTTP | p50 ms | p99 ms | gateway's CPU, ms/frame | failed |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for row in rows:
        print(
            f"| {row.protocol} | {row.clients} | {row.rate:.1f} | {row.ratio:.2f} | {row.p50_ms:.1f} "
            f"| {row.p99_ms:.1f} | {row.gateway_ms:.2f} | {row.failed} |"
        )
    print(json.dumps({"grpc": [row.__dict__ for row in rows]}))
    return int(any(row.failed for row in rows))


def _measure(folder: Path, clients: Sequence[int], rounds: int, seconds: float) -> list[Row]:
    with _served(folder) as (gateway, http_port, grpc_port), LoadProcess() as process:
        loads = _loads(folder, http_port, grpc_port)
        for load in loads.values():
            while not process.measure(replace(load, clients=1, seconds=1.0)).answered:
                pass  # until the gateway has read the descriptions
        found: dict[tuple[str, int], list[tuple[LoadResult, float]]] = {}
        for _ in range(rounds):
            for count in clients:
                for name, load in loads.items():
                    before = cpu_seconds([gateway.pid])
                    result = process.measure(replace(load, clients=count, seconds=seconds))
                    spent_s = cpu_seconds([gateway.pid]) - before
                    found.setdefault((name, count), []).append((result, spent_s / max(result.total, 1)))
    return [_row(name, count, found) for name, count in found]


def _row(name: str, count: int, found: dict[tuple[str, int], list[tuple[LoadResult, float]]]) -> Row:
    results = [result for result, _ in found[name, count]]
    bases = [result.rate for result, _ in found[_HTTP, count]]
    return Row(
        name,
        count,
        statistics.median(result.rate for result in results),
        statistics.median(result.p50_ms or 0.0 for result in results),
        statistics.median(result.p99_ms or 0.0 for result in results),
        statistics.median(result.rate / base for result, base in zip(results, bases, strict=True)),
        1e3 * statistics.median(spent_s for _, spent_s in found[name, count]),
        # Clients never pause, so that some requests are on their way when the measurement ends.
        sum(result.failed - result.failures.get("unanswered", 0) for result in results),
    )


def _loads(folder: Path, http_port: int, grpc_port: int) -> dict[str, Load]:
    """Write the same frame as the body of each protocol."""
    from serve.gateway.grpc.messages import INFERENCE, message_class
    from serve.synthetic.scenes import sample_frame

    frame = sample_frame()
    tensor = {"name": "points", "datatype": "FP32", "shape": [len(frame) // 16, 4]}
    header = orjson.dumps(
        {
            "inputs": [{**tensor, "parameters": {"binary_data_size": len(frame)}}],
            "parameters": {"binary_data_output": True},
        }
    )
    http, grpc = folder / "frame.v2", folder / "frame.message"
    http.write_bytes(header + frame)
    message = message_class("inference.ModelInferRequest")(model_name="second", raw_input_contents=[frame])
    message.inputs.add(**tensor)
    grpc.write_bytes(message.SerializeToString())
    headers = {
        "content-type": "application/octet-stream",
        "inference-header-content-length": str(len(header)),
    }
    host, most = "127.0.0.1", 10**9
    return {
        _HTTP: Load(host, http_port, "/v2/models/second/infer", str(http), headers, max_requests=most),
        "gRPC, ModelInfer": Load(
            host, grpc_port, f"/{INFERENCE}/ModelInfer", str(grpc), protocol="grpc", max_requests=most
        ),
        "gRPC, one stream": Load(
            host,
            grpc_port,
            f"/{INFERENCE}/ModelStreamInfer",
            str(grpc),
            protocol="grpc-stream",
            max_requests=most,
        ),
    }


@contextmanager
def _served(folder: Path) -> Iterator[tuple[ManagedProcess, int, int]]:
    """Serve the demo; yields the gateway and its ports of HTTP and gRPC."""
    from serve.cli.demo import CHECKPOINT, CONFIG
    from serve.convert import Conversion, convert

    archive = convert(Conversion(CONFIG, CHECKPOINT, folder, "second")).path
    inference, management, metrics, grpc_port = free_ports(4)
    options = TorchServeOptions(
        folder,
        [ServedModel(archive.name)],
        inference_port=inference,
        management_port=management,
        metrics_port=metrics,
        system_metrics=False,
    )
    with TorchServe(options) as server:
        command = [sys.executable, "-m", "serve", "gateway", "--port", "0", "--log-level", "warning"]
        command += ["--inference-url", server.inference_url, "--management-url", server.management_url]
        command += ["--worker-sockets", str(server.worker_sockets), "--grpc-port", str(grpc_port)]
        if server.tokens() and server.run_dir is not None:
            command += ["--backend-key-file", str(server.run_dir / KEY_FILE)]
        command += ["--client-share", "1.0"]  # all clients are on one address here
        with ManagedProcess("the gateway", command) as gateway:
            port = int(gateway.wait_for("gateway      ", _READY_S).rpartition(":")[2])
            yield gateway, port, grpc_port

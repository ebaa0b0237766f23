"""``python -m tools.bench NAME``: the benchmarks."""

from __future__ import annotations

from tools.commands import dispatch

COMMANDS = {
    "detector": ("tools.bench.commands.detector", "upstream's inference against ours, stage by stage"),
    "ops": ("tools.bench.commands.ops", "each kernel on its own"),
    "operators": (
        "tools.bench.commands.operators",
        "what one frame asks of a GPU: operators, synchronisations; needs no GPU",
    ),
    "triton": (
        "tools.bench.commands.triton",
        "the kernels in Triton, compiled for a card: registers, shared memory; needs no GPU",
    ),
    "serving": (
        "tools.bench.commands.serving",
        "the gateway against TorchServe alone, LitServe, mosec, BentoML",
    ),
    "fairness": (
        "tools.bench.commands.fairness",
        "one model of a gateway under a flood of requests for another",
    ),
    "grpc": ("tools.bench.commands.grpc", "the Open Inference Protocol over HTTP and over gRPC, in pairs"),
    "shadow": (
        "tools.bench.commands.shadow",
        "what shadow traffic costs the requests that it copies, in turns",
    ),
    "bulk": (
        "tools.bench.commands.bulk",
        "a run over many frames beside the runtime alone, or its two engines, in pairs",
    ),
    "bulk-memory": ("tools.bench.commands.bulk_memory", "memory of a run over ten million frames"),
    "workers": ("tools.bench.commands.workers", "how workers and threads divide the cores"),
    "storage": ("tools.bench.commands.storage", "s3:// and FFRecord against boto3 and pread; packing"),
    "native-env": (
        "tools.bench.commands.native_env",
        "an environment with upstream's compiled mmcv and spconv",
    ),
}

if __name__ == "__main__":
    raise SystemExit(dispatch("python -m tools.bench", COMMANDS))

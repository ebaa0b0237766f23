"""``python -m tools.bench ops``: time each kernel on its own."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from serve.cli.entry import bounded

__all__ = ["main"]


def main(argv: Sequence[str] | None) -> int:
    """Parse the command line, measure, print a table and then one line of JSON."""
    parser = argparse.ArgumentParser(
        description="Time each kernel at inference sizes, in milliseconds: the numba version for CPUs, the torch "
        "version for any device, and an alternative if there is one. Prints a table and one line of JSON."
    )
    parser.add_argument("--filter", default="", help="only kernels whose names contain this text")
    parser.add_argument("--device", default="cpu", help="cpu or cuda:N (default: %(default)s)")
    parser.add_argument(
        "--threads", type=bounded(int, 0), default=0, help="torch threads (default: torch's own)"
    )
    parser.add_argument("--native-python", type=Path, help="Python with a compiled mmcv, to time that too")
    parser.add_argument(
        "--compile-only",
        action="store_true",
        help="call each kernel once on small inputs to fill the JIT cache",
    )
    parser.add_argument(
        "--processes",
        type=bounded(int, 1),
        default=1,
        help="with --compile-only: so many compile side by side (default: 1)",
    )
    args = parser.parse_args(argv)
    import torch

    from serve.runtime.model import parse_device
    from tools.bench import ops

    parse_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.compile_only:
        tqdm.monitor_interval = 0  # no thread of tqdm's: compile_all forks
    bar: tqdm[Any]
    with tqdm(
        total=len([name for name in ops.CASES if args.filter in name]), unit="kernel", file=sys.stderr
    ) as bar:

        def tick(kernel: str) -> None:
            bar.set_description(kernel)
            bar.update()

        if args.compile_only:
            print(f"{ops.compile_all(tick, args.processes)} kernels")
            return 0
        result = ops.run(args.device, args.filter, args.native_python, tick)
    print(result.table())
    print(result.json_line(), flush=True)
    return 0

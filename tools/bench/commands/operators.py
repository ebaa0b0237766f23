"""``python -m tools.bench operators``: operators and synchronisations of one frame, on a stand-in for CUDA."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

__all__ = ["main"]


def main(argv: Sequence[str] | None) -> int:
    """Count and print; 0 if all counts are within their bounds and all answers equal."""
    import torch

    from serve import archive
    from tools.bench import operators
    from tools.bench.commands.detector import archive_model, read_frame

    parser = argparse.ArgumentParser(
        prog="python -m tools.bench operators",
        description="Count the operators, synchronisations and uploads of one frame on a stand-in for CUDA, which "
        "needs no device, and compare the answer with that of the CPU. Prints a table and one line of JSON.",
    )
    parser.add_argument(
        "models", nargs="*", help="zoo names (default: those with bounds: " + " ".join(operators.BOUNDS) + ")"
    )
    parser.add_argument("--checkpoint", type=Path, help="for a single model (default: random weights)")
    parser.add_argument("--frame", help="path or URI of a frame (default: the golden frame)")
    args = parser.parse_args(argv)
    args.device = "cpu"
    result = operators.OperatorBenchmark(torch.__version__)
    for name in args.models or operators.BOUNDS:
        print(name, file=sys.stderr)
        with tempfile.TemporaryDirectory(prefix="mmdet3d-serve-bench-") as folder:
            _, resolved, _ = archive_model(name, Path(folder), args)
            frame = read_frame(Path(folder), resolved, args)
            opened = archive.open_directory(Path(folder) / "opened")
            result.rows.append(operators.count(opened, frame.read_bytes()))
    print(result.table())
    print(result.json_line(), flush=True)
    return int(not all(row.equal and row.within_bounds for row in result.rows))

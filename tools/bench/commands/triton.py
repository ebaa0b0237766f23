"""``python -m tools.bench triton``: the kernels in Triton, compiled for a card that need not be there."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None) -> int:
    """Compile and print."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench triton",
        description="Compile every kernel in Triton for a card, which need not be there, and print the registers and "
        "the memory that it takes, as a table and one line of JSON. Needs Triton (make test-triton has it).",
    )
    parser.add_argument(
        "--capability", type=int, default=90, help="compute capability, 80 or above (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    from tools.bench.triton_kernels import compile_kernels

    result = compile_kernels(args.capability)
    print(result.table())
    print(result.json_line(), flush=True)
    return 0

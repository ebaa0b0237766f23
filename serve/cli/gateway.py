"""``mmdet3d-serve gateway``: run the gateway alone, in front of a TorchServe elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from serve import logs
from serve.gateway.options import GatewayOptions, parser
from serve.gateway.server import run
from serve.settings import Settings

__all__ = ["main"]


def main(argv: Sequence[str] | None) -> int:
    """Parse the command line and serve until SIGTERM or Ctrl-C; 0 when everything in flight was answered."""
    made = parser(
        "Batch, limit and route requests for detections to TorchServe. Every flag is also an environment variable: "
        "--batch-points is MMDET3D_SERVE_GATEWAY_BATCH_POINTS."
    )
    options = GatewayOptions.build(vars(made.parse_args(argv)), Settings.from_environment().gateway)
    logs.set_up(options.log_format, options.log_level)
    return run(options, lambda address: _tell(options, address))


def _tell(options: GatewayOptions, address: str) -> None:
    if options.address_file is None:
        print(f"gateway      {address}", file=sys.stderr, flush=True)
        return
    # Whole or not at all, for who waits for it.
    part = options.address_file.with_suffix(".part")
    part.write_text(f"{address}\n")
    part.rename(options.address_file)

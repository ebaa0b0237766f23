"""``mmdet3d-serve gateway``: run the gateway alone, in front of a TorchServe elsewhere.

``python -m serve.cli.gateway`` is the gateway that `serve.torchserve.supervisor` starts, or one of several that
`serve.gateway.processes` starts: it reads one JSON document from standard input.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from serve import logs
from serve.cli.entry import command_parser
from serve.cli.entry import run as run_command
from serve.cli.flags import add_flags, add_help_all, values_of
from serve.errors import SettingsError
from serve.gateway.options import GatewayOptions
from serve.gateway.processes import run_processes
from serve.gateway.server import run
from serve.gateway.siblings import Siblings

__all__ = ["main"]


def main(argv: Sequence[str] | None) -> int:
    """Parse the command line and serve until SIGTERM or Ctrl-C; 0 when everything in flight was answered."""
    parser = command_parser(
        "gateway",
        "Batch, limit and route requests for detections to TorchServe. Every flag is also an environment variable: "
        "--batch-points is MMDET3D_SERVE_GATEWAY_BATCH_POINTS (but --max-frame-bytes is MMDET3D_SERVE_MAX_FRAME_BYTES, "
        "which the workers read too). docs/settings.md lists them all.",
        [
            "gateway --inference-url http://10.0.0.5:8080 --management-url http://10.0.0.5:8081",
            "gateway --host 0.0.0.0 --api-keys-file keys.txt --batch-points 4000000",
        ],
    )
    add_help_all(parser)
    add_flags(parser, GatewayOptions, title="gateway")
    options = GatewayOptions.build(values_of(parser.parse_args(argv), GatewayOptions))
    logs.set_up(options.log_format, options.log_level)
    serve = run if options.gateways == 1 else run_processes
    return serve(options, on_listening=lambda url: print(f"gateway      {url}", file=sys.stderr, flush=True))


def _run_inherited(argv: Sequence[str] | None) -> int:
    """Serve with the document on standard input, from `serve.torchserve.supervisor` or `serve.gateway.processes`."""
    try:
        document = json.load(sys.stdin)
        inherited = document.get("listener")
        listener = None if inherited is None else socket.socket(fileno=inherited)
        siblings = Siblings(Path(document["siblings"]), document["index"]) if "siblings" in document else None
    except (ValueError, KeyError, TypeError, OSError):
        raise SettingsError(
            "this is the gateway that `mmdet3d-serve serve` starts; run `mmdet3d-serve gateway` instead"
        ) from None
    options = GatewayOptions(**document["options"])
    logs.set_up(options.log_format, options.log_level)
    rejected = document["rejected"]
    if options.gateways > 1:
        return run_processes(options, listener=listener, rejected=rejected, on_listening=_report_ready)
    return run(options, listener=listener, rejected=rejected, siblings=siblings, on_listening=_report_ready)


def _report_ready(url: str) -> None:
    print(url, flush=True)
    os.dup2(2, 1)  # The supervisor reads one line; what is printed later goes to standard error.


if __name__ == "__main__":
    sys.exit(run_command(_run_inherited))

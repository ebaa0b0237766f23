"""``mmdet3d-serve label-studio``: an ML backend that lets Label Studio predict with a served model."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import uvicorn

from serve import logs
from serve.cli.entry import command_parser
from serve.cli.flags import add_flags, add_help_all, values_of
from serve.gateway.listener import bind, url_of
from serve.labelling.options import LabelStudioOptions
from serve.labelling.server import create_backend

__all__ = ["main"]


def main(argv: Sequence[str] | None) -> int:
    """Serve until SIGTERM or Ctrl-C."""
    parser = command_parser(
        "label-studio",
        "Answer the predictions of Label Studio with a model for images that a gateway serves: rectangles, brush masks "
        "and polygons. In Label Studio, add the address under Settings, Model. Every flag is also an environment "
        "variable: --model is MMDET3D_SERVE_LABEL_STUDIO_MODEL. docs/labelling.md has the rest.",
        [
            "label-studio --model faster-rcnn --label-studio-url http://127.0.0.1:8080",
            "label-studio --model mask-rcnn --local-files /data/images --score-thr 0.5",
        ],
    )
    add_help_all(parser)
    add_flags(parser, LabelStudioOptions, title="backend")
    options = LabelStudioOptions.build(values_of(parser.parse_args(argv), LabelStudioOptions))
    logs.set_up("text", "info")
    app = create_backend(options)
    with bind(options.host, options.port) as listener:
        print(f"label-studio {url_of(listener)}", file=sys.stderr, flush=True)
        config = uvicorn.Config(app, log_config=None, access_log=False, server_header=False, lifespan="on")
        uvicorn.Server(config).run(sockets=[listener])
    return 0

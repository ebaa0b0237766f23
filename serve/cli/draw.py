"""``mmdet3d-serve draw``: draw detections on a point cloud or an image."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from serve.cli.entry import bounded, command_parser
from serve.errors import BadRequest
from serve.visualize.detections import draw_frame, encode_png

__all__ = ["main"]


def main(argv: Sequence[str] | None) -> int:
    """Parse the command line and draw one frame."""
    parser = command_parser(
        "draw",
        "Draw detections: a point cloud from above with its boxes, or an image with its boxes and masks. DETECTIONS "
        "is a server's JSON response, saved as a file.",
        [
            "draw frame.bin detections.json -o frame.png",
            "draw street.jpg detections.json -o street.png --score-thr 0.3",
        ],
    )
    parser.add_argument("frame", metavar="FRAME", type=Path, help="point cloud (.bin, .npy) or image")
    parser.add_argument("detections", metavar="DETECTIONS", type=Path, help="JSON file with the response")
    parser.add_argument("-o", "--output", type=Path, required=True, help="PNG file to write")
    parser.add_argument(
        "--score-thr",
        type=bounded(float, 0, 1),
        default=0.0,
        metavar="SCORE",
        help="lowest score to draw, 0 to 1 (default: %(default)g)",
    )
    parser.add_argument(
        "--load-dim",
        type=bounded(int, 3, 1024),
        default=4,
        metavar="N",
        help="floats per point of a .bin (default: %(default)s)",
    )
    for side, default in (("width", 1200), ("height", 900)):
        parser.add_argument(
            f"--{side}",
            type=bounded(int, 64, 16384, "pixels"),
            default=default,
            metavar="PIXELS",
            help="of the drawing of a point cloud (default: %(default)s)",
        )
    parser.add_argument("--title", help="caption (default: the file name)")
    args = parser.parse_args(argv)
    try:
        image = draw_frame(
            args.frame.read_bytes(),
            json.loads(args.detections.read_bytes()),
            load_dim=args.load_dim,
            size=(args.width, args.height),
            title=args.frame.name if args.title is None else args.title,
            score_thr=args.score_thr,
        )
    except (ValueError, TypeError, KeyError) as error:
        raise BadRequest(f"{args.detections} holds no detections that can be drawn: {error}") from None
    args.output.write_bytes(encode_png(image))
    print(args.output)
    return 0

"""``mmdet3d-serve demo``: a served SECOND, a sample frame, its answer and an image of it."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from serve import archive
from serve.cli.entry import command_parser, stage_reporter
from serve.cli.flags import add_flags, add_help_all, values_of
from serve.cli.serve import KNOWN_TO_SERVE, STATE_DIR, archive_demo, serve_until_stopped, stoppable
from serve.client import Client
from serve.errors import ArchiveError
from serve.gateway.options import GatewayOptions
from serve.settings import Settings
from serve.storage.hashes import sha256_of
from serve.torchserve import ServedModel, TorchServeOptions
from serve.torchserve.supervisor import Service, gateway_options
from serve.visualize.detections import draw_frame, encode_png

__all__ = ["main"]

ASSETS = Path(__file__).parents[1] / "assets"
CONFIG, CHECKPOINT = ASSETS / "second_demo.py", ASSETS / "second_demo.pth"
SAMPLE = ASSETS / "sample.bin"
SCORE_THR = 0.3


def main(argv: Sequence[str] | None) -> int:
    """Parse the command line, archive, serve, ask once, show, and wait for Ctrl-C."""
    parser = command_parser(
        "demo",
        "Serve the demo SECOND (synthetic streets, not KITTI) until Ctrl-C, and send it one frame.",
        ["demo", "demo --gateway-port 9000"],
    )
    add_help_all(parser)
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("demo"),
        metavar="DIR",
        help="for archive, frame, answer and image (default: %(default)s)",
    )
    add_flags(parser, Settings, title=None, only=("open_management",))
    add_flags(parser, TorchServeOptions, title="TorchServe", leave_out=("state_dir",))
    add_flags(
        parser,
        GatewayOptions,
        title="gateway",
        prefix="gateway-",
        leave_out=KNOWN_TO_SERVE,
        common=("host", "port"),
    )
    args = parser.parse_args(argv)
    options = TorchServeOptions.build(
        values_of(args, TorchServeOptions),
        fixed={
            "model_store": args.folder,
            "models": [ServedModel("second.mar")],
            "state_dir": STATE_DIR,
            "open_management": Settings.build(values_of(args, Settings)).open_management,
        },
    )
    gateway = gateway_options(options, values_of(args, GatewayOptions), defaults={"log_format": "text"})
    with stoppable():
        args.folder.mkdir(parents=True, exist_ok=True)
        _ensure_archive(args.folder)
        frame = args.folder / "sample.bin"
        shutil.copyfile(SAMPLE, frame)
        return serve_until_stopped(
            Service(options, gateway, report=stage_reporter()),
            lambda running, seconds: _show(running, seconds, frame),
        )


def _ensure_archive(folder: Path) -> None:
    """Keep an archive that still is of this config, checkpoint and version; else make it."""
    path = folder / "second.mar"
    try:
        source = archive.verify(path).source
        if (source["config_sha256"], source["checkpoint_sha256"]) == (
            sha256_of(CONFIG),
            sha256_of(CHECKPOINT),
        ):
            return
    except (ArchiveError, KeyError):
        pass
    print("archiving the demo SECOND …", file=sys.stderr, flush=True)
    archive_demo(folder)


def _show(service: Service, seconds: float, frame: Path) -> None:
    body = frame.read_bytes()
    address = service.gateway_url or service.torchserve.inference_url
    with Client(address) as client:
        answer = client.predict(body, "second", score_thr=SCORE_THR)
    frame.with_suffix(".json").write_bytes(answer.encoded)
    frame.with_suffix(".png").write_bytes(encode_png(draw_frame(body, answer, load_dim=4)))
    print(
        f"ready after {seconds:.1f} s; the sample frame has {len(answer['names'])} detections of {SCORE_THR} or more:"
    )
    print(_table(answer))
    print(f"\nfrom         {frame} ({len(body) // 16} points), answer {frame.with_suffix('.json')}")
    print(f"image        {frame.with_suffix('.png')}")
    print(f"try          curl -T {frame} {address}/predictions/second")
    print(f"draw         curl -T {frame} -H 'Accept: image/png' -o seen.png {address}/predictions/second")
    print(f"torchserve   {service.torchserve.inference_url}/predictions/second")
    print("Ctrl-C stops it.", flush=True)


def _table(answer: Mapping[str, Any], most: int = 12) -> str:
    rows = ["  class        score     x m     y m     z m  length  width  height  yaw rad"]
    for name, score, box in list(zip(answer["names"], answer["scores_3d"], answer["bboxes_3d"], strict=True))[
        :most
    ]:
        x, y, z, dx, dy, dz, yaw = box[:7]
        rows.append(
            f"  {name:<12} {score:5.2f} {x:7.2f} {y:7.2f} {z:7.2f} {dx:7.2f} {dy:6.2f} {dz:7.2f} {yaw:8.2f}"
        )
    return "\n".join(rows)

"""``mmdet3d-serve demo``: a served SECOND, a sample frame, its answer and a picture of it."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from serve import archive
from serve.cli.entry import command_parser
from serve.cli.serve import STATE_DIR, demonstration, serve_until_stopped, stoppable
from serve.client import Client
from serve.errors import ArchiveError
from serve.protocol import frames as wire
from serve.storage.download import sha256_of
from serve.torchserve import ServedModel, TorchServeOptions
from serve.torchserve.supervisor import Service
from serve.visualize.detections import draw_frame, encode_png

__all__ = ["main"]

ASSETS = Path(__file__).parents[1] / "assets"
CONFIG, CHECKPOINT = ASSETS / "second_demo.py", ASSETS / "second_demo.pth"
SAMPLE = ASSETS / "sample.bin"
SCORE_THR = 0.3


def main(argv: Sequence[str] | None) -> int:
    """Parse the command line, archive, serve, ask once, show, and wait for Ctrl-C."""
    default = TorchServeOptions(model_store=Path("demo"))
    parser = command_parser(
        "demo",
        "Serve the demonstration SECOND (synthetic streets, not KITTI) until Ctrl-C, and send it one frame.",
        ["demo", "demo --gateway-port 9000"],
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=default.model_store,
        help="for archive, frame, answer and picture (default: %(default)s)",
    )
    for use in ("inference", "management", "metrics"):
        port = getattr(default, f"{use}_port")
        parser.add_argument(
            f"--{use}-port", type=int, default=port, metavar="PORT", help="default: %(default)s"
        )
    parser.add_argument("--gateway-port", type=int, default=8000, metavar="PORT", help="default: %(default)s")
    args = parser.parse_args(argv)
    with stoppable():
        args.folder.mkdir(parents=True, exist_ok=True)
        _ensure_archive(args.folder)
        frame = args.folder / "sample.bin"
        shutil.copyfile(SAMPLE, frame)
        options = TorchServeOptions(
            model_store=args.folder,
            models=(ServedModel("second.mar"),),
            inference_port=args.inference_port,
            management_port=args.management_port,
            metrics_port=args.metrics_port,
            state_dir=STATE_DIR,
        )
        service = Service(options, {"port": str(args.gateway_port), "log_format": "text"})
        return serve_until_stopped(service, lambda running, seconds: _show(running, seconds, frame))


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
    print("archiving the demonstration SECOND …", file=sys.stderr, flush=True)
    demonstration(folder)


def _show(service: Service, seconds: float, frame: Path) -> None:
    body = frame.read_bytes()
    address = service.gateway_url or service.torchserve.inference_url
    with Client(address) as client:
        answer = client.predict(body, "second", score_thr=SCORE_THR)
    frame.with_suffix(".json").write_bytes(wire.encode_json(answer))
    frame.with_suffix(".png").write_bytes(encode_png(draw_frame(body, answer, load_dim=4)))
    print(
        f"ready after {seconds:.1f} s; the sample frame has {len(answer['names'])} detections of {SCORE_THR} or more:"
    )
    print(_table(answer))
    print(f"\nfrom         {frame} ({len(body) // 16} points), answer {frame.with_suffix('.json')}")
    print(f"picture      {frame.with_suffix('.png')}")
    print(f"try          curl -T {frame} {address}/predictions/second")
    print(f"a picture    curl -T {frame} -H 'Accept: image/png' -o seen.png {address}/predictions/second")
    print(f"torchserve   {service.torchserve.inference_url}/predictions/second")
    print("Ctrl-C stops it.", flush=True)


def _table(answer: dict[str, Any], most: int = 12) -> str:
    rows = ["  class        score     x m     y m     z m  length  width  height  yaw rad"]
    for name, score, box in list(zip(answer["names"], answer["scores_3d"], answer["bboxes_3d"], strict=True))[
        :most
    ]:
        x, y, z, dx, dy, dz, yaw = box[:7]
        rows.append(
            f"  {name:<12} {score:5.2f} {x:7.2f} {y:7.2f} {z:7.2f} {dx:7.2f} {dy:6.2f} {dz:7.2f} {yaw:8.2f}"
        )
    return "\n".join(rows)

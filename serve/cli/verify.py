"""``mmdet3d-serve verify``: compare a served model with native inference on config and checkpoint."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from tqdm import tqdm

from serve.cli.entry import command_parser
from serve.client import Client
from serve.compare.detections import Tolerances
from serve.storage import is_remote, local_path
from serve.verify.endpoint import draw_report, read_token, summary, verify
from serve.verify.frame_source import frames_at
from serve.verify.reference import load_reference
from serve.zoo.config_source import local_config

__all__ = ["main"]


def main(argv: Sequence[str] | None) -> int:
    """Run the comparison; 0 they agree, 1 they differ."""
    args = _parser().parse_args(argv)
    limits = {
        name: value
        for name, value in {
            "box_m": args.box_tolerance,
            "box_px": args.box_tolerance,
            "yaw_rad": args.yaw_tolerance,
            "score": args.score_tolerance,
            "mask_iou": args.mask_iou,
        }.items()
        if value is not None
    }
    tolerances = Tolerances(**limits)
    token = read_token(args.token_file) if args.token_file else None
    with Client(args.inference_addr, token=token, timeout_s=args.timeout_s) as client:
        checkpoint = local_path(args.checkpoint) if is_remote(args.checkpoint) else args.checkpoint
        with local_config(args.config) as config:
            native = load_reference(config, checkpoint, args.device)
        for note in native.notes:
            print(f"note: native weights: {note}", file=sys.stderr)
        reports = []
        with frames_at(args.img, native.modality) as frames:
            bar = tqdm(frames, unit="frame", disable=len(frames) == 1)
            checked = verify(
                bar, native, client, args.model_name, score_thr=args.score_thr, tolerances=tolerances
            )
            for report in checked:
                reports.append(report)
                tqdm.write(report.text(args.rows) + "\n")
                if args.draw:
                    draw_report(report, args.draw, native.load_dim)
    print(summary(reports))
    return 0 if all(report.comparison.ok for report in reports) else 1


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "verify",
        "Compare a served model with native mmdet / mmdet3d inference on config and checkpoint. Exit status: 0 they "
        "agree, 1 they differ, 2 the comparison was not possible.",
        [
            "verify frame.bin second second.pth second",
            "verify frames/ my_config.py my.pth my-model --inference-addr 127.0.0.1:8000 --score-thr 0.1",
        ],
    )
    parser.add_argument(
        "img", metavar="IMAGE_FILE", help="cloud (.bin, .npy), image, a folder of them, or the address of either "
        "(s3://bucket/frames, ffrecord:///packed.ffr#velodyne)"
    )  # fmt: skip
    parser.add_argument(
        "config", metavar="CONFIG_FILE", help="config file or its address, or a name in the model zoo"
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT_FILE", help="checkpoint file or its address")
    parser.add_argument("model_name", metavar="MODEL_NAME", help="name the model is served under")
    parser.add_argument(
        "--inference-addr", default="127.0.0.1:8080", help="host:port of the server (default: %(default)s)"
    )
    parser.add_argument(
        "--device", help="device of the native side: cpu or cuda:N (default: cuda:0 if there is one)"
    )
    parser.add_argument(
        "--score-thr", type=float, default=0.3, help="compare detections that score at least this, 0 to 1 "
        "(default: %(default)s)"
    )  # fmt: skip
    parser.add_argument(
        "--timeout-s", type=float, default=120.0, help="wait for an answer, seconds (default: %(default)g)"
    )
    parser.add_argument("--token-file", help="file with the server's token, or TorchServe's key_file.json")
    defaults = Tolerances()
    parser.add_argument(
        "--box-tolerance", type=float, help=f"largest deviation of a box value "
        f"(default: {defaults.box_m:g} metres in 3D, {defaults.box_px:g} pixels in 2D)"
    )  # fmt: skip
    parser.add_argument(
        "--yaw-tolerance",
        type=float,
        help=f"largest deviation of a heading, radians (default: {defaults.yaw_rad:g})",
    )
    parser.add_argument(
        "--score-tolerance", type=float, help=f"largest deviation of a score (default: {defaults.score:g})"
    )
    parser.add_argument(
        "--mask-iou", type=float, help=f"least IoU of two masks, 0 to 1 (default: {defaults.mask_iou:g})"
    )
    parser.add_argument("--rows", type=int, default=20, help="rows per table (default: %(default)s)")
    parser.add_argument("--draw", metavar="DIR", help="draw both sides of every frame into this folder")
    return parser

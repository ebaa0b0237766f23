"""``mmdet3d-serve verify``: compare a served model with native inference on config and checkpoint."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace

from tqdm import tqdm

from serve.cli.entry import add_checkpoint_flags, bounded, command_parser, open_cache, stage_reporter
from serve.client import Client
from serve.compare.tolerances import Tolerances, tolerances_for
from serve.convert.classes import read_class_names
from serve.storage import is_remote, local_path
from serve.verify.endpoint import read_token, verify
from serve.verify.frame_source import frames_at
from serve.verify.reference_loading import load_reference
from serve.verify.report import draw_report, frame_table, summary
from serve.zoo.config_source import local_config

__all__ = ["main"]


def main(argv: Sequence[str] | None) -> int:
    """Run the comparison; returns 0 for a match and 1 for a mismatch."""
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
    token = read_token(args.token_file) if args.token_file else None
    with Client(args.inference_addr, token=token, timeout_s=args.timeout_s) as client:
        report = stage_reporter()
        report("reading config and checkpoint")
        remote = is_remote(args.checkpoint)
        checkpoint = local_path(args.checkpoint, open_cache()) if remote else args.checkpoint
        with local_config(args.config) as config:
            report("loading the native model")
            reference = load_reference(
                config,
                checkpoint,
                args.device,
                classes=read_class_names(args.classes) if args.classes else (),
                allow_partial=args.allow_partial,
                trust_checkpoint=args.trust_checkpoint,
            )
        tolerances = replace(tolerances_for(next(reference.module.parameters()).device), **limits)
        for note in reference.notes:
            print(f"note: native weights: {note}", file=sys.stderr)
        results = []
        with frames_at(args.img, reference.modality) as frames:
            report(f"comparing {len(frames)} frame{'' if len(frames) == 1 else 's'}")
            bar = tqdm(frames, unit="frame", disable=len(frames) == 1)
            for result in verify(
                bar, reference, client, args.model_name, score_thr=args.score_thr, tolerances=tolerances
            ):
                results.append(result)
                tqdm.write(frame_table(result, args.rows) + "\n")
                if args.draw:
                    draw_report(result, args.draw, reference.load_dim)
    print(summary(results))
    return 0 if all(result.comparison.ok for result in results) else 1


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "verify",
        "Compare a served model with native mmdet / mmdet3d inference on config and checkpoint. Exit status: 0 match, "
        "1 mismatch, 2 error.",
        [
            "verify frame.bin second second.pth second",
            "verify frames/ my_config.py my.pth my-model --inference-addr 127.0.0.1:8000 --score-thr 0.1",
        ],
    )
    parser.add_argument(
        "img",
        metavar="IMAGE_FILE",
        help="point cloud (.bin, .npy, .npz, PCD, PLY, LAS), image, a folder of them, or the URI of either "
        "(s3://bucket/frames, ffrecord:///packed.ffr#velodyne); a frame of several parts is a folder with one file per "
        "part (points.bin, image.png, calibration.json; of several sweeps points.bin, sweep.0.bin, …, sweeps.json)",
    )
    parser.add_argument("config", metavar="CONFIG_FILE", help="path or URI of a config, or a zoo name")
    parser.add_argument("checkpoint", metavar="CHECKPOINT_FILE", help="path or URI of a checkpoint")
    parser.add_argument("model_name", metavar="MODEL_NAME", help="name of the served model")
    parser.add_argument(
        "--inference-addr", default="127.0.0.1:8080", help="host:port of the server (default: %(default)s)"
    )
    parser.add_argument(
        "--device", help="device of the native model: cpu or cuda:N (default: cuda:0 if available)"
    )
    parser.add_argument(
        "--score-thr", type=bounded(float, 0, 1), default=0.3, help="lowest score of the compared detections, 0 to 1 "
        "(default: %(default)s)"
    )  # fmt: skip
    parser.add_argument(
        "--timeout-s",
        type=bounded(float, 0.001, unit="seconds"),
        default=120.0,
        help="timeout of a request, seconds (default: %(default)g)",
    )
    parser.add_argument("--token-file", help="file with the server's token, or TorchServe's key_file.json")
    defaults = Tolerances()
    parser.add_argument(
        "--box-tolerance", type=bounded(float, 0), help=f"largest deviation of a box value "
        f"(default: {defaults.box_m:g} metres in 3D, {defaults.box_px:g} pixels in 2D)"
    )  # fmt: skip
    parser.add_argument(
        "--yaw-tolerance",
        type=bounded(float, 0, unit="radians"),
        help=f"largest deviation of a heading, radians (default: {defaults.yaw_rad:g})",
    )
    parser.add_argument(
        "--score-tolerance",
        type=bounded(float, 0, 1),
        help=f"largest deviation of a score (default: {defaults.score:g})",
    )
    parser.add_argument(
        "--mask-iou",
        type=bounded(float, 0, 1),
        help=f"least IoU of two masks, 0 to 1 (default: {defaults.mask_iou:g})",
    )
    add_checkpoint_flags(parser)
    parser.add_argument(
        "--rows", type=bounded(int, 0), default=20, help="rows per table (default: %(default)s)"
    )
    parser.add_argument("--draw", metavar="DIR", help="draw native and served detections into this folder")
    return parser

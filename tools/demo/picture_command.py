"""``python -m tools.demo picture``: a synthetic scene as a camera and from above, with its detections."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from serve import archive
from serve.cli.entry import bounded
from serve.convert import Conversion, convert
from serve.protocol.frame_spec import FrameSpec
from serve.protocol.frames import decode_frame
from serve.protocol.options import FrameOptions
from serve.runtime import load_detector
from serve.settings import Limits
from serve.synthetic.camera import LIDAR_TO_IMAGE, render_seed
from serve.synthetic.scenes import Scene, generate_scene, held_out_seed
from serve.visualize.birds_eye import draw_birds_eye_view
from serve.visualize.detections import encode_png
from serve.visualize.overlays import draw_projected
from tools.demo.training import CHECKPOINT, CONFIG

WIDTH, HEIGHT_FROM_ABOVE = 1242, 600
EXTENT_M = (0.5, -25.0, 38.0, 25.0)
GAP = 6


def main(argv: Sequence[str] | None) -> int:
    """Parse the command line, detect, draw, write one PNG."""
    parser = argparse.ArgumentParser(
        description="Draw a synthetic scene with the demo SECOND's detections: what a camera beside the "
        "LiDAR would see, rendered, and the point cloud from above."
    )
    parser.add_argument(
        "out", type=Path, nargs="?", default=Path("docs/images/scene.png"), help="PNG to write"
    )
    parser.add_argument(
        "--seed",
        type=bounded(int, 0),
        default=held_out_seed(1),
        help="scene number, 0 or more (default: %(default)s)",
    )
    parser.add_argument(
        "--score-thr",
        type=bounded(float, 0, 1),
        default=0.5,
        help="leave out lower scores, 0 to 1 (default: %(default)g)",
    )
    args = parser.parse_args(argv)
    scene = generate_scene(args.seed)
    answer = detect(scene)
    args.out.write_bytes(encode_png(picture(args.seed, scene, answer, args.score_thr)))
    shown = sum(score >= args.score_thr for score in answer["scores_3d"])
    print(f"{args.out}: {scene.summary()}; {shown} detections of score {args.score_thr:g} or more")
    return 0


def detect(scene: Scene) -> dict[str, Any]:
    """Predict the scene as a worker does: archive the demo model, load it, run the frame."""
    with tempfile.TemporaryDirectory() as folder:
        path = convert(Conversion(CONFIG, CHECKPOINT, Path(folder), "second")).path
        detector = load_detector(archive.extract(path, Path(folder) / "opened"), torch.device("cpu"))
        frame = decode_frame(scene.to_bytes(), FrameSpec("lidar", load_dim=4), FrameOptions(), Limits())
        (outcome,) = detector.run([frame])
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def picture(seed: int, scene: Scene, answer: dict[str, Any], score_thr: float) -> np.ndarray:
    """Stack the camera's image and the bird's-eye view, both with boxes; BGR."""
    parts = {
        "image": cv2.imencode(".png", render_seed(seed))[1].tobytes(),
        "calibration": json.dumps({"lidar2img": LIDAR_TO_IMAGE.tolist()}).encode(),
    }
    camera = draw_projected(parts, answer, score_thr=score_thr)
    above = draw_birds_eye_view(
        scene.points, answer, size=(WIDTH, HEIGHT_FROM_ABOVE), score_thr=score_thr, extent_m=EXTENT_M
    )
    return np.concatenate([camera, np.zeros((GAP, WIDTH, 3), np.uint8), above])

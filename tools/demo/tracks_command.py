"""Print CLEAR MOT of the demo SECOND's tracks over the moving scene, or of tracks that a run of ``predict`` wrote."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serve.cli.entry import bounded
from serve.predict import load_model, open_source
from serve.predict.run import Run, run
from serve.protocol.options import FrameOptions
from serve.synthetic.moving import FRAMES, MOVERS, MovingFrame, generate_sequence
from serve.synthetic.scenes import CLASSES
from serve.tracking import UNTRACKED, TrackOptions
from serve.tracking.clear_mot import ClearMot
from tools.demo.training import CHECKPOINT, CONFIG

__all__ = ["main", "measure"]

# Objects with fewer returns are not counted, and neither are the tracks on them.
_FEWEST_RETURNS = 5
_REACH_M = 2.0


def main(argv: Sequence[str] | None) -> int:
    """Parse the command line, write the scene, predict, print a table and one line of JSON."""
    parser = argparse.ArgumentParser(
        description="Write a synthetic sequence of point clouds, run `predict --track` over it with the demo SECOND, "
        "and print CLEAR MOT per class: MOTA, switches of ids, misses, false tracks."
    )
    parser.add_argument(
        "--frames", type=bounded(int, 1, FRAMES), default=FRAMES, help="frames (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, help="keep clouds and predictions in this folder")
    parser.add_argument(
        "--predictions",
        type=Path,
        help="measure this predictions.jsonl of the sequence instead of predicting",
    )
    parser.add_argument("--config", type=Path, default=CONFIG, help="mmdet3d config (default: the demo's)")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="weights (default: the demo's)")
    parser.add_argument("--device", default="cpu", help="torch device, cpu or cuda:N (default: %(default)s)")
    args = parser.parse_args(argv)
    frames = list(generate_sequence(args.frames))
    with tempfile.TemporaryDirectory(prefix="mmdet3d-serve-tracks-") as scratch:
        lines = args.predictions or _predict(frames, args.out or Path(scratch), args)
        scores = measure(frames, _answers(lines))
    print(_table(scores))
    print(json.dumps({name: _row(score) for name, score in scores.items()}))
    return 0


def measure(frames: Sequence[MovingFrame], answers: Iterator[Mapping[str, Any]]) -> dict[str, ClearMot]:
    """Count the tracks of answers, per class and in total (``all``).

    Args:
        frames: the sequence.
        answers: the answer to each frame, with ``track_ids``.
    """
    scores = {name: ClearMot(_REACH_M) for name in CLASSES}
    for frame, answer in zip(frames, answers, strict=True):
        ids = np.array(answer["track_ids"], np.int64)
        labels = np.array([CLASSES.index(name) for name in answer["names"]], np.int64)
        places = np.array(answer["bboxes_3d"], np.float64).reshape(len(ids), -1)[:, :3]
        seen = frame.scene.points_in_box >= _FEWEST_RETURNS
        shown = (ids != UNTRACKED) & ~_on_ignored(places, frame.scene.boxes[~seen])
        for label, name in enumerate(CLASSES):
            true, found = seen & (frame.scene.labels == label), shown & (labels == label)
            true_places = frame.scene.boxes[true, :3].astype(np.float64)
            scores[name].update(frame.ids[true], true_places, ids[found], places[found])
    return {**scores, "all": ClearMot.total(scores.values())}


def _on_ignored(places: NDArray[np.float64], ignored: NDArray[np.float32]) -> NDArray[np.bool_]:
    apart = np.linalg.norm(places[:, None] - ignored[None, :, :3], axis=-1)
    return np.asarray((apart <= _REACH_M).any(1))


def _predict(frames: Sequence[MovingFrame], folder: Path, args: argparse.Namespace) -> Path:
    clouds = folder / "velodyne"
    clouds.mkdir(parents=True)
    for number, frame in enumerate(frames):
        (clouds / f"{number:06d}.bin").write_bytes(frame.scene.to_bytes())
    out = folder / "predictions"
    with load_model(str(args.config), str(args.checkpoint), device=args.device) as model:
        source = open_source(clouds, model.modality)
        options = FrameOptions(score_thr=TrackOptions().low_score)
        run(Run(source, model, out, ("jsonl",), options=options, tracks=TrackOptions()))
    return out / "predictions.jsonl"


def _answers(lines: Path) -> Iterator[Mapping[str, Any]]:
    for line in lines.read_bytes().splitlines():
        yield json.loads(line)["answer"]


def _row(score: ClearMot) -> dict[str, Any]:
    return {
        "mota": round(score.mota, 4) if score.objects else None,
        "motp_m": round(score.motp, 3) if score.objects > score.misses else None,
        "objects": score.objects,
        "switches": score.switches,
        "fragments": score.fragments,
        "misses": score.misses,
        "false_tracks": score.false_tracks,
    }


def _table(scores: Mapping[str, ClearMot]) -> str:
    lines = [
        f"{'class':<12}{'MOTA':>8}{'switches':>10}{'fragments':>11}{'misses':>8}{'false':>7}{'objects':>9}"
    ]
    for name, score in scores.items():
        lines.append(
            f"{name:<12}{score.mota:>8.3f}{score.switches:>10}{score.fragments:>11}{score.misses:>8}"
            f"{score.false_tracks:>7}{score.objects:>9}"
        )
    lines.append(f"{len(MOVERS)} objects in sight of a LiDAR, some of them hidden for a while")
    return "\n".join(lines)

"""``tools/bench_detector.py``: the arguments and the words; the measuring is `serve.benchmark`'s."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from serve import archive, convert, golden, zoo

__all__ = ["bench_detector"]


def bench_detector(argv: Sequence[str] | None) -> int:
    """Parse the command line, measure, print a table and then one line of JSON per model."""
    parser = argparse.ArgumentParser(
        description="Time mmdet's / mmdet3d's own inference_detector beside our runtime, turn by turn in one process. "
        "Prints a table and one line of JSON per model."
    )
    parser.add_argument(
        "models", nargs="*", default=["second", "pointpillars"], help="zoo names (default: %(default)s)"
    )
    parser.add_argument(
        "--checkpoint", type=Path, help="for a single model; default: random weights that behave"
    )
    parser.add_argument("--frame", type=Path, help="frame of the models' kind (default: a made one)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda:N (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="counted rounds (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.checkpoint and len(args.models) != 1:
        parser.error("--checkpoint goes with one model")
    for name in args.models:
        with tempfile.TemporaryDirectory(prefix="mmdet3d-serve-bench-") as folder:
            _bench_one(name, Path(folder), args)
    return 0


def _bench_one(name: str, folder: Path, args: argparse.Namespace) -> None:
    from serve.benchmark import detector
    from serve.random_weights import write_random_checkpoint
    from serve.runtime.samples import frame_spec

    config = zoo.resolve(name).config_path
    resolved, _ = convert.resolve_config(config)
    checkpoint = args.checkpoint or folder / "random.pth"
    if args.checkpoint is None:
        write_random_checkpoint(resolved, tuple(convert.configured_classes(resolved)), checkpoint)
    made = convert.convert(convert.Conversion(config, checkpoint, folder, name, device=args.device))
    frame = args.frame
    if frame is None:
        file, body = golden.golden_frame(frame_spec(resolved))
        frame = folder / file
        frame.write_bytes(body)
    opened = archive.extract(made.path, folder / "opened")
    bar: tqdm[Any]
    with tqdm(total=args.rounds + 2, unit="round", file=sys.stderr) as bar:
        result = detector.run(
            opened,
            config,
            checkpoint,
            frame,
            device=args.device,
            rounds=args.rounds,
            progress=lambda done: _tick(bar, done),
        )
    print(result.table())
    print(result.json_line(), flush=True)


def _tick(bar: tqdm[Any], done: int) -> None:
    """Move the bar to `done` rounds."""
    bar.update(done - bar.n)

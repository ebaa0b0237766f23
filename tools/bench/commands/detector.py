"""``python -m tools.bench detector``: upstream's inference against ours."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from serve import archive, convert, storage, zoo
from serve.cli.entry import bounded, open_cache
from serve.convert import golden
from serve.runtime.model import parse_device
from serve.settings import Settings

__all__ = ["archive_model", "main", "read_frame"]

ROOT = Path(__file__).resolve().parents[3]


def main(argv: Sequence[str] | None) -> int:
    """Parse the command line, measure, print a table and then one line of JSON per model."""
    parser = argparse.ArgumentParser(
        description="Time mmdet's / mmdet3d's own inference_detector against our runtime in alternating rounds, or "
        "our runtime against the size of its input. Prints a table (ms) and one line of JSON (s) per model."
    )
    parser.add_argument(
        "models", nargs="*", help="zoo names (default: second pointpillars; with --scaling: second)"
    )
    parser.add_argument(
        "--checkpoint", type=Path, help="for a single model (default: calibrated random weights)"
    )
    parser.add_argument(
        "--frame", help="path or URI of a frame (default: the golden frame of the model's kind)"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda:N (default: %(default)s)")
    parser.add_argument(
        "--rounds", type=bounded(int, 1), help="counted rounds (default: 7; with --scaling: 3)"
    )
    parser.add_argument(
        "--batch",
        type=bounded(int, 1),
        help="frames that our runtime gets at once, the same one several times (default: 1); times are per frame, and "
        "upstream's inference_detector takes one at a time",
    )
    parser.add_argument(
        "--native-python",
        type=Path,
        metavar="PYTHON",
        help="run upstream in this Python, with its kernels (`python -m tools.bench native-env` creates one with "
        "compiled mmcv and spconv: .venv-native/bin/python); default: in this process, on our kernels",
    )
    parser.add_argument(
        "--scaling",
        action="store_true",
        help="our runtime alone: synthetic point clouds of 10,000 to 1,000,000 points, batches of 1 to 8 frames of "
        "30,000 points",
    )
    parser.add_argument(
        "--skipping",
        action="store_true",
        help="our runtime alone, with and without skipping of background: the share of each layer that is computed, "
        "times, and whether 50 clouds give the same bits (cpu only)",
    )
    args = parser.parse_args(argv)
    models = args.models or (["second"] if args.scaling else ["second", "pointpillars"])
    if args.skipping and (args.scaling or args.native_python or args.device != "cpu"):
        parser.error("--skipping accepts neither --scaling nor --native-python, and runs on the cpu")
    if args.checkpoint and len(models) != 1:
        parser.error("--checkpoint requires exactly one model")
    if args.batch and (args.scaling or args.skipping):
        parser.error("--batch accepts neither --scaling nor --skipping")
    if args.scaling and (args.native_python or args.frame):
        parser.error("--scaling accepts neither --native-python nor --frame: it generates its frames")
    parse_device(args.device)
    if args.device == "cpu" and Settings.from_environment().keep_heap:
        from serve.runtime.malloc import disable_malloc_trim

        disable_malloc_trim()  # as workers do
    for name in models:
        with tempfile.TemporaryDirectory(prefix="mmdet3d-serve-bench-") as folder:
            measure = _scale_one if args.scaling else _skip_one if args.skipping else _bench_one
            result = measure(name, Path(folder), args)
        print(result.table())
        print(result.json_line(), flush=True)
    return 0


def archive_model(name: str, folder: Path, args: argparse.Namespace) -> tuple[Path, dict[str, Any], Path]:
    """Archive a model and unpack it in ``folder/opened``; return config, resolved config and checkpoint."""
    from serve.convert.random_weights import write_random_checkpoint

    config = zoo.resolve(name).config_path
    resolved = convert.resolve_config(config).config
    checkpoint = args.checkpoint or folder / "random.pth"
    if args.checkpoint is None:
        write_random_checkpoint(resolved, tuple(convert.configured_classes(resolved)), checkpoint)
    made = convert.convert(convert.Conversion(config, checkpoint, folder, name, device=args.device))
    archive.extract(made.path, folder / "opened")
    return config, resolved, checkpoint


def _bench_one(name: str, folder: Path, args: argparse.Namespace) -> Any:
    from tools.bench import detector

    config, resolved, checkpoint = archive_model(name, folder, args)
    frame = read_frame(folder, resolved, args)
    opened = archive.open_directory(folder / "opened")
    rounds = args.rounds or 7
    bar: tqdm[Any]
    with tqdm(total=rounds + 2, unit="round", file=sys.stderr) as bar:
        return detector.run(
            detector.Workload(opened, config, checkpoint, frame, args.device),
            native_python=args.native_python,
            rounds=rounds,
            batch=args.batch or 1,
            progress=lambda done: _tick(bar, done),
        )


def read_frame(folder: Path, resolved: dict[str, Any], args: argparse.Namespace) -> Path:
    """Return the file of the frame to measure: the given one, or the golden frame of the model's kind."""
    from serve.runtime.pipeline import frame_spec

    if args.frame:
        return storage.local_path(args.frame, open_cache())
    ((file, body),) = golden.golden_frame(frame_spec(resolved)).values()
    (folder / file).write_bytes(body)
    return folder / file


def _skip_one(name: str, folder: Path, args: argparse.Namespace) -> Any:
    import torch

    from serve.runtime import load_detector
    from tools.bench import skipping

    _, resolved, _ = archive_model(name, folder, args)
    frame = read_frame(folder, resolved, args)
    detector = load_detector(archive.open_directory(folder / "opened"), torch.device("cpu"))
    rounds = args.rounds or 7
    bar: tqdm[Any]
    with tqdm(total=rounds + skipping.CLOUDS, unit="run", file=sys.stderr) as bar:
        return skipping.run(
            detector, frame.name, frame.read_bytes(), rounds=rounds, progress=lambda done: _tick(bar, done)
        )


def _scale_one(name: str, folder: Path, args: argparse.Namespace) -> Any:
    import torch

    from serve.runtime import load_detector
    from tools.bench import scaling

    archive_model(name, folder, args)
    detector = load_detector(archive.open_directory(folder / "opened"), torch.device(args.device))
    bar: tqdm[Any]
    with tqdm(total=len(scaling.POINTS) + len(scaling.BATCHES), unit="size", file=sys.stderr) as bar:
        return scaling.run(detector, rounds=args.rounds or 3, progress=lambda done: _tick(bar, done))


def _tick(bar: tqdm[Any], done: int) -> None:
    """Move the bar to `done` rounds."""
    bar.update(done - bar.n)

"""The commands that make archives: by config and checkpoint as upstream's do, or by the name of a model.

Knows the arguments and the words; the work is `serve.zoo`'s, `serve.download`'s and `serve.convert`'s.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from serve import convert, download, zoo
from serve.errors import ModelLookupError
from serve.settings import Settings

__all__ = ["archive_by_name", "to_torchserve"]


def to_torchserve(argv: Sequence[str] | None, package: str) -> int:
    """``mmdet3d2torchserve.py CONFIG CHECKPOINT --output-folder STORE --model-name NAME`` and its mmdet twin."""
    parser = argparse.ArgumentParser(
        description=f"Convert a {package} config and checkpoint to a TorchServe archive (.mar) that proves itself."
    )
    parser.add_argument("config", help="config file, or the name of a model in the zoo (former names too)")
    parser.add_argument("checkpoint", help="checkpoint file (.pth, .safetensors), or its http(s) address")
    parser.add_argument("--output-folder", type=Path, required=True, help="model store; made if missing")
    _add_options(parser)
    args = parser.parse_args(argv)
    entry = zoo.resolve(args.config, package=package)
    _tell_notes(entry.notes if not Path(args.config).is_file() else ())
    checkpoint = _fetched(args.checkpoint, args)
    name = args.model_name or checkpoint.stem
    return _convert(entry.config_path, checkpoint, name, args.output_folder, args)


def archive_by_name(argv: Sequence[str] | None) -> int:
    """``make archive MODEL=second``: look the model up, fetch its weights, convert."""
    parser = argparse.ArgumentParser(
        description="Make a TorchServe archive of a model by its name (second, pointpillars, faster-rcnn, …, a full or "
        "former zoo name, or a config path). Weights come from the zoo unless --checkpoint is given."
    )
    parser.add_argument("model", nargs="?", help="name of the model, or path of a config")
    parser.add_argument(
        "--checkpoint", help="checkpoint file or http(s) address instead of the zoo's weights"
    )
    parser.add_argument(
        "--output-folder", type=Path, default=Path("model-store"), help="default: %(default)s"
    )
    parser.add_argument(
        "--list", metavar="WORDS", nargs="*", help="list the models whose names hold all WORDS, and stop"
    )
    _add_options(parser)
    args = parser.parse_args(argv)
    if args.list is not None:
        return _list(" ".join(args.list))
    if not args.model:
        parser.error("name a model, for instance: second (or --list)")
    entry = zoo.resolve(args.model)
    _tell_notes(entry.notes)
    checkpoint = _fetched(
        args.checkpoint or zoo.weights_of(entry), args, entry.sha256_prefix if not args.checkpoint else None
    )
    default_name = args.model if not Path(args.model).is_file() else entry.name
    return _convert(entry.config_path, checkpoint, args.model_name or default_name, args.output_folder, args)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model-name", help="name to serve under (letters, digits, '.', '_', '-')")
    parser.add_argument("--model-version", default="1.0", help="digits and dots (default: %(default)s)")
    parser.add_argument("-f", "--force", action="store_true", help="replace an existing archive")
    parser.add_argument(
        "--extra-files", default="", metavar="A,B", help="files to pack under extra/, separated by commas"
    )
    parser.add_argument("--device", default="cpu", help="where the golden frame is run: cpu or cuda:N")
    parser.add_argument(
        "--golden-frame", type=Path, help="prove the archive on this frame instead of a made one"
    )
    parser.add_argument(
        "--allow-partial", action="store_true", help="go on when weights are missing or left over"
    )
    parser.add_argument(
        "--trust-checkpoint",
        action="store_true",
        help="unpickle anything the checkpoint holds; it can run code",
    )
    parser.add_argument("--no-fold", action="store_true", help="do not fold batch norms into convolutions")
    parser.add_argument(
        "--no-channels-last", action="store_true", help="keep convolutions in NCHW memory order"
    )
    parser.add_argument(
        "--autocast",
        choices=("off", "fp16", "bf16"),
        default="off",
        help="precision on CUDA (default: %(default)s)",
    )
    parser.add_argument(
        "--cache-dir", type=Path, help="where downloads are kept (default: MMDET3D_SERVE_CACHE_DIR)"
    )


def _fetched(source: str, args: argparse.Namespace, sha256_prefix: str | None = None) -> Path:
    if not source.startswith(("http://", "https://")):
        return Path(source).expanduser()
    cache = args.cache_dir or Settings.from_environment().cache_dir
    return download.fetch(source, cache.expanduser(), sha256_prefix=sha256_prefix)


def _convert(config: Path, checkpoint: Path, name: str, folder: Path, args: argparse.Namespace) -> int:
    started = time.perf_counter()

    def report(step: str) -> None:
        print(f"[{time.perf_counter() - started:5.1f} s] {step}", file=sys.stderr, flush=True)

    made = convert.convert(
        convert.Conversion(
            config=config,
            checkpoint=checkpoint,
            output_folder=folder,
            model_name=name,
            model_version=args.model_version,
            device=args.device,
            force=args.force,
            allow_partial=args.allow_partial,
            trust_checkpoint=args.trust_checkpoint,
            extra_files=[Path(file) for file in args.extra_files.split(",") if file],
            golden_frame=args.golden_frame,
            channels_last=not args.no_channels_last,
            fold_batch_norm=not args.no_fold,
            autocast=args.autocast,
            report=report,
        )
    )
    _tell_notes(made.notes)
    folded = len(made.metadata.inference.fold_batch_norm)
    report("done")
    print(f"archive   {made.path} ({made.path.stat().st_size / 1e6:.1f} MB)")
    print(f"sha256    {made.sha256}")
    meta = made.metadata
    print(f"model     {meta.name} {meta.version}, {len(meta.classes)} classes, {folded} norms folded")
    print(
        f"proved    {made.golden_detections} detections on its golden frame, the same after opening it afresh"
    )
    return 0


def _tell_notes(notes: Sequence[str]) -> None:
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def _list(query: str) -> int:
    entries = zoo.list_models(query=query)
    if not entries:
        raise ModelLookupError(f"no model has a name with '{query}'")
    for entry in entries:
        weights = "" if entry.weights_url else "  (no published weights)"
        print(f"{entry.package:8} {entry.name}{weights}")
    return 0

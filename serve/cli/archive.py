"""The commands that make archives: by config and checkpoint as upstream's do, or by the name of a model.

Config, checkpoint and output folder may be addresses (`serve.storage`). Knows the arguments and the words; the
work is `serve.zoo.index`'s, `serve.storage`'s and `serve.convert.conversion`'s.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from serve import convert, storage, zoo
from serve.archive import store as model_store
from serve.cli.entry import command_parser
from serve.errors import ArchiveError
from serve.settings import Settings
from serve.zoo.config_source import local_config

__all__ = ["main", "to_torchserve"]


def to_torchserve(argv: Sequence[str] | None, package: str) -> int:
    """``mmdet3d2torchserve.py CONFIG CHECKPOINT --output-folder STORE --model-name NAME`` and its mmdet twin."""
    parser = argparse.ArgumentParser(
        description=f"Convert a {package} config and checkpoint to a TorchServe archive (.mar) that proves itself."
    )
    parser.add_argument("config", help="config file or its address, or the name of a model in the zoo")
    parser.add_argument(
        "checkpoint", help="checkpoint file (.pth, .safetensors) or its address (s3://…, https://…)"
    )
    parser.add_argument(
        "--output-folder", required=True, help="model store: a folder, made if missing, or s3://bucket/models"
    )
    _add_options(parser)
    args = parser.parse_args(argv)
    with local_config(args.config) as config:
        entry = zoo.resolve(config, package=package)
        _tell_notes(entry.notes if not Path(config).is_file() else ())
        checkpoint = _fetched(args.checkpoint, args)
        name = args.model_name or checkpoint.stem
        return _convert(entry.config_path, checkpoint, name, args.output_folder, args)


def main(argv: Sequence[str] | None) -> int:
    """Look the model up, fetch its weights, convert."""
    parser = command_parser(
        "archive",
        "Make a TorchServe archive of a model by its name (second, pointpillars, faster-rcnn, …, a full or former zoo "
        "name, or a config path). Weights come from the zoo unless --checkpoint is given.",
        [
            "archive second",
            "archive my_config.py --checkpoint my.pth --model-name mine",
            "archive second --output-folder s3://bucket/models",
        ],
    )
    parser.add_argument("model", metavar="MODEL", help="name of the model, or path or address of a config")
    parser.add_argument(
        "--checkpoint", help="checkpoint file or its address (s3://…, https://…) instead of the zoo's weights"
    )
    parser.add_argument(
        "--output-folder", default="model-store", help="folder, or s3://bucket/models (default: %(default)s)"
    )
    _add_options(parser)
    args = parser.parse_args(argv)
    with local_config(args.model) as model:
        entry = zoo.resolve(model)
        _tell_notes(entry.notes)
        checkpoint = _fetched(
            args.checkpoint or zoo.require_weights_url(entry),
            args,
            entry.sha256_prefix if not args.checkpoint else None,
        )
        name = args.model_name or (model if not Path(model).is_file() else entry.name)
        return _convert(entry.config_path, checkpoint, name, args.output_folder, args)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model-name", help="name to serve under (letters, digits, '.', '_', '-')")
    parser.add_argument("--model-version", default="1.0", help="digits and dots (default: %(default)s)")
    parser.add_argument("-f", "--force", action="store_true", help="replace an existing archive")
    parser.add_argument(
        "--extra-files", default="", metavar="A,B", help="files to pack under extra/, separated by commas"
    )
    parser.add_argument("--device", default="cpu", help="where the golden frame is run: cpu or cuda:N")
    parser.add_argument("--golden-frame", help="prove the archive on this frame instead of a made one")
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
    if not storage.is_remote(source):
        return Path(source).expanduser()
    settings = Settings.from_environment()
    cache = storage.Cache(args.cache_dir or settings.cache_dir, settings.cache_max_bytes)
    return storage.local_path(source, sha256=sha256_prefix, cache=cache)


def _convert(config: Path, checkpoint: Path, name: str, store: str, args: argparse.Namespace) -> int:
    """Into the folder, or through a folder that is thrown away into the bucket."""
    if not storage.is_remote(store):
        return _convert_into(config, checkpoint, name, Path(store), args)
    place = model_store.archive_uri(store, name)
    if not args.force and storage.exists(place):
        raise ArchiveError(f"{place} exists; choose another --model-name, or replace it with --force")
    with tempfile.TemporaryDirectory(prefix="mmdet3d-serve-store-") as folder:
        code = _convert_into(config, checkpoint, name, Path(folder), args)
        print(f"uploaded  {model_store.publish(Path(folder, f'{name}.mar'), store, force=args.force)}")
        return code


def _convert_into(config: Path, checkpoint: Path, name: str, folder: Path, args: argparse.Namespace) -> int:
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
            extra_files=[_fetched(file, args) for file in args.extra_files.split(",") if file],
            golden_frame=_fetched(args.golden_frame, args) if args.golden_frame else None,
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

"""``mmdet3d-serve archive`` and upstream's converters: archives from a model name, or from config and checkpoint.

Config, checkpoint and output folder may be URIs (`serve.storage`).
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from serve import archive, convert, storage, zoo
from serve.archive.store import archive_uri, publish
from serve.cli import zoo as zoo_command
from serve.cli.entry import add_checkpoint_flags, command_parser, open_cache, stage_reporter
from serve.convert.classes import read_class_names
from serve.convert.work_dir import BEST, LAST, is_work_dir, trained_checkpoint, trained_config
from serve.errors import ArchiveError
from serve.zoo.config_source import local_config

__all__ = ["NOTHING_PROVED", "main", "to_torchserve"]

NOTHING_PROVED = 3  # exit code
_EXIT_CODES = (
    "Exit status: 0 written and proved; 2 error, nothing written; 3 written, but nothing was found in the golden "
    "frame, so that nothing is proved (--golden-frame)."
)


def to_torchserve(argv: Sequence[str] | None, package: str) -> int:
    """Run ``mmdet3d2torchserve.py CONFIG CHECKPOINT --output-folder STORE --model-name NAME`` or its mmdet twin."""
    parser = argparse.ArgumentParser(
        description=f"Convert a {package} config and checkpoint to a TorchServe archive (.mar) that proves itself. "
        + _EXIT_CODES
    )
    parser.add_argument("config", help="path or URI of a config, or the name of a model in the zoo")
    parser.add_argument(
        "checkpoint", help="path or URI (s3://…, https://…) of a checkpoint (.pth, .safetensors)"
    )
    parser.add_argument(
        "--output-folder",
        required=True,
        help="model store: a folder, created if missing, or s3://bucket/models",
    )
    _add_options(parser)
    args = parser.parse_args(argv)
    _check_names(args)
    with local_config(args.config) as config:
        entry = zoo.resolve(config, package=package)
        _print_notes(entry.notes if not Path(config).is_file() else ())
        checkpoint = _fetch(args.checkpoint, args)
        name = args.model_name or checkpoint.stem
        return _convert(entry.config_path, checkpoint, name, args.output_folder, args)


def main(argv: Sequence[str] | None) -> int:
    """Look up the model, fetch its weights, convert."""
    parser = command_parser(
        "archive",
        "Create a TorchServe archive of a model by its name (second, pointpillars, faster-rcnn, …, a full or former "
        "zoo name, or a config path), or of what a training wrote to its folder. The zoo's weights are used unless "
        "--checkpoint is given; of a training the best checkpoint, or else the last. " + _EXIT_CODES,
        [
            "archive second",
            "archive my_config.py --checkpoint my.pth --model-name mine",
            "archive work_dirs/my_config",
            "archive second --output-folder s3://bucket/models",
        ],
    )
    parser.add_argument("--list", nargs="*", metavar="WORD", help=argparse.SUPPRESS)  # until 0.3
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        help="name of the model, path or URI of a config, or folder of a training (--work-dir)",
    )
    parser.add_argument(
        "--checkpoint",
        help="path or URI (s3://…, https://…) of a checkpoint in place of the zoo's weights; of a training also "
        "best or last",
    )
    parser.add_argument(
        "--output-folder", default="model-store", help="folder, or s3://bucket/models (default: %(default)s)"
    )
    _add_options(parser)
    args = parser.parse_args(argv)
    if args.list is not None:
        print("warning: '--list' is now 'mmdet3d-serve zoo'; it will be removed in 0.3", file=sys.stderr)
        return zoo_command.main(args.list)
    if args.model is None:
        parser.error("MODEL is not set; `mmdet3d-serve zoo` lists the names")
    _check_names(args)
    if is_work_dir(Path(args.model)):
        return _convert_training(Path(args.model), args)
    with local_config(args.model) as model:
        entry = zoo.resolve(model)
        _print_notes(entry.notes)
        checkpoint = _fetch(
            args.checkpoint or zoo.require_weights_url(entry),
            args,
            entry.sha256_prefix if not args.checkpoint else None,
        )
        name = args.model_name or (model if not Path(model).is_file() else entry.name)
        return _convert(entry.config_path, checkpoint, name, args.output_folder, args)


def _convert_training(folder: Path, args: argparse.Namespace) -> int:
    """Convert what a training wrote to its folder, under the name of its config."""
    config = trained_config(folder)
    if args.checkpoint in (BEST, LAST, None):
        checkpoint, reason = trained_checkpoint(folder, args.checkpoint)
    else:
        checkpoint, reason = _fetch(args.checkpoint, args), "as named"
    print(f"config     {config}\ncheckpoint {checkpoint} ({reason})", file=sys.stderr, flush=True)
    return _convert(config, checkpoint, args.model_name or config.stem, args.output_folder, args)


def _check_names(args: argparse.Namespace) -> None:
    """Reject a name or version that cannot be served before anything is fetched."""
    archive.check_identity(args.model_name or "model", args.model_version)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model-name", help="name to serve under (letters, digits, '.', '_', '-')")
    parser.add_argument("--model-version", default="1.0", help="digits and dots (default: %(default)s)")
    parser.add_argument("-f", "--force", action="store_true", help="replace an existing archive")
    parser.add_argument(
        "--extra-files", default="", metavar="A,B", help="files to pack under extra/, separated by commas"
    )
    parser.add_argument(
        "--parts",
        type=Path,
        metavar="FOLDER",
        help="also write what the archive is made of into an empty folder, for torch-model-archiver",
    )
    parser.add_argument("--device", default="cpu", help="device of the golden frame: cpu or cuda:N")
    parser.add_argument(
        "--golden-frame",
        metavar="FILE",
        help="prove the archive on this frame instead of a synthetic one; for a frame of several parts a folder with "
        "one file per part",
    )
    add_checkpoint_flags(parser)
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
        "--cache-dir", type=Path, help="folder for downloads (default: MMDET3D_SERVE_CACHE_DIR)"
    )


def _fetch(source: str, args: argparse.Namespace, sha256_prefix: str | None = None) -> Path:
    if not storage.is_remote(source):
        return Path(source).expanduser()
    print(f"fetching {storage.parse(source)}", file=sys.stderr, flush=True)
    return storage.local_path(source, open_cache(args.cache_dir), sha256=sha256_prefix)


def _convert(config: Path, checkpoint: Path, name: str, store: str, args: argparse.Namespace) -> int:
    """Convert into a folder, or through a temporary folder into a bucket."""
    if args.parts is not None:
        archive.check_parts_folder(args.parts, name)
    if not storage.is_remote(store):
        return _convert_into(config, checkpoint, name, Path(store), args)
    target = archive_uri(store, name)
    if not args.force and storage.exists(target):
        raise ArchiveError(f"{target} exists; choose another --model-name, or replace it with --force")
    with tempfile.TemporaryDirectory(prefix="mmdet3d-serve-store-") as folder:
        code = _convert_into(config, checkpoint, name, Path(folder), args)
        print(f"uploaded  {publish(Path(folder, f'{name}.mar'), store, force=args.force)}")
        return code


def _convert_into(config: Path, checkpoint: Path, name: str, folder: Path, args: argparse.Namespace) -> int:
    report = stage_reporter()
    result = convert.convert(
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
            extra_files=[_fetch(file, args) for file in args.extra_files.split(",") if file],
            golden_frame=_fetch(args.golden_frame, args) if args.golden_frame else None,
            channels_last=not args.no_channels_last,
            fold_batch_norm=not args.no_fold,
            autocast=args.autocast,
            classes=read_class_names(args.classes) if args.classes else (),
            report=report,
        )
    )
    report("done")
    _print_result(result)
    if args.parts is not None:
        print(f"parts     {shlex.join(archive.write_parts(result.path, args.parts))}")
    return 0 if result.golden_detections else NOTHING_PROVED


def _print_result(result: convert.ConversionResult) -> None:
    """Print the last lines: what was written, what it costs, what was proved, and what serving needs."""
    metadata, cost = result.metadata, result.cost
    print(f"archive   {result.path} ({result.path.stat().st_size / 1e6:.1f} MB)")
    print(f"sha256    {result.sha256}")
    print(
        f"model     {metadata.name} {metadata.version}, {len(metadata.classes)} classes, "
        f"{result.parameters:,} parameters, {len(metadata.inference.fold_batch_norm)} norms folded"
    )
    on_device = (
        f", {cost.device_memory_bytes / 1e6:,.0f} MB on {cost.device}" if cost.device_memory_bytes else ""
    )
    print(
        f"cost      {cost.seconds:.3g} s for the golden frame on {cost.device}, at most "
        f"{cost.memory_bytes / 1e6:,.0f} MB in the worker's process{on_device}"
    )
    for note in result.notes:
        print(f"note      {note}")
    if result.golden_detections:
        print(
            f"proved    {result.golden_detections} detections in its golden frame, the same in a fresh process with "
            "only the archive"
        )
    else:
        print(
            "warning   nothing is proved: nothing was found in the golden frame, so that nothing was compared; take "
            "one with objects in it by --golden-frame FILE"
        )
    if result.needs_trust:
        print(
            "serving   needs MMDET3D_SERVE_TRUST_ARCHIVE_CODE=1, because the archive runs its author's code"
        )


def _print_notes(notes: Sequence[str]) -> None:
    for note in notes:
        print(f"note: {note}", file=sys.stderr)

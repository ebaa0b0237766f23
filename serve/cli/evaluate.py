"""``mmdet3d-serve evaluate``: average precision of a served model on a data set, beside the native model's."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path

from tqdm import tqdm

from serve.cli.entry import add_checkpoint_flags, bounded, command_parser, open_cache, stage_reporter
from serve.convert.classes import read_class_names
from serve.errors import SettingsError
from serve.evaluate.data_set import data_settings, open_data_set
from serve.evaluate.endpoints import ArchiveEndpoint, Endpoint, ServerEndpoint
from serve.evaluate.evaluation import Evaluation, evaluate
from serve.evaluate.frames import DataFrame
from serve.evaluate.report import json_line, table
from serve.storage import is_remote, local_path
from serve.upstream.checkpoints import trust_checkpoints
from serve.upstream.config_argument import config_file
from serve.verify.endpoint import read_token
from serve.verify.reference import ReferenceModel
from serve.verify.reference_loading import choose_device, load_reference
from serve.zoo.config_source import local_config

__all__ = ["main"]


def main(argv: Sequence[str] | None) -> int:
    """Evaluate; returns 0, or 1 if a figure differs by more than ``--max-difference``."""
    parser = _parser()
    args = parser.parse_args(argv)
    if (args.archive is None) == (args.model is None):
        parser.error("name a served model (--url, --model NAME) or an archive (--archive FILE), one of them")
    if args.out is not None:
        _check_writable(args.out)
    report = stage_reporter()
    with ExitStack() as stack:
        config = Path(stack.enter_context(config_file(args.config)))
        other = Path(stack.enter_context(config_file(args.dataset))) if args.dataset else None
        endpoint = _endpoint(args, stack, report)
        report("reading the data set")
        data = open_data_set(data_settings(config, args.cfg_options, other), args.limit)
        report(f"evaluating {data.size} of {len(data.dataset)} frames")

        def progress(frames: Iterable[DataFrame]) -> Iterable[DataFrame]:
            return tqdm(frames, total=data.size, unit="frame", file=sys.stderr, disable=None, leave=False)

        found = evaluate(
            data,
            endpoint,
            (lambda: _native(args, stack, report)) if args.checkpoint else None,
            predictions=args.out,
            progress=progress,
        )
        report("done")
    print(table(found))
    print(json_line(found, model=endpoint.name, config=args.config))
    return _verdict(found, args.max_difference)


def _check_writable(out: Path) -> None:
    """Check that a file can be written before hours of frames are evaluated for it."""
    if out.is_dir():
        raise SettingsError(f"--out {out} is a folder; name a file in it")
    if not os.access(out.parent, os.W_OK | os.X_OK):
        state = "cannot be written to" if out.parent.is_dir() else "does not exist"
        raise SettingsError(f"--out {out}: the folder {out.parent} {state}; name a file in another")


def _verdict(found: Evaluation, max_difference: float) -> int:
    """Exit code of an evaluation."""
    if found.detections[0] is None:
        print("note: without --checkpoint there is no native model to compare with", file=sys.stderr)
        return 0
    if found.detections == (0, 0):
        print("note: neither side has detections, so that nothing is compared", file=sys.stderr)
        return 3
    if found.largest_difference is None:
        print("note: no figure has a value on both sides, so that nothing is compared", file=sys.stderr)
        return 3
    return 1 if found.largest_difference > max_difference else 0


def _endpoint(args: argparse.Namespace, stack: ExitStack, report: Callable[[str], None]) -> Endpoint:
    if args.archive is None:
        token = read_token(args.token_file) if args.token_file else None
        return ServerEndpoint(
            args.url,
            args.model,
            args.model_version,
            token=token,
            timeout_s=args.timeout_s,
            concurrency=args.concurrency,
        )
    report("opening the archive")
    path = local_path(args.archive, open_cache()) if is_remote(args.archive) else Path(args.archive)
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="mmdet3d-serve-archive-"))
    return ArchiveEndpoint(
        path, Path(folder, "opened"), choose_device(args.device), trust_code=args.trust_archive_code
    )


def _native(args: argparse.Namespace, stack: ExitStack, report: Callable[[str], None]) -> ReferenceModel:
    report("loading the native model")
    trust_checkpoints(args.trust_checkpoint)
    remote = is_remote(args.checkpoint)
    model = load_reference(
        stack.enter_context(local_config(args.config)),
        local_path(args.checkpoint, open_cache()) if remote else args.checkpoint,
        args.device,
        classes=read_class_names(args.classes) if args.classes else (),
        allow_partial=args.allow_partial,
        trust_checkpoint=args.trust_checkpoint,
    )
    for note in model.notes:
        print(f"note: native weights: {note}", file=sys.stderr)
    return model


def _parser() -> argparse.ArgumentParser:
    from mmengine.config import DictAction

    parser = command_parser(
        "evaluate",
        "Compute the metrics of a config's test_evaluator (COCO, Pascal VOC, Cityscapes, KITTI, nuScenes, Lyft) by "
        "upstream's own code from what a server answers to the frames of its test data set; with --checkpoint beside "
        "those of the native model on the same frames, with the difference per class. Prints a table and one line of "
        "JSON. Exit status: 0 no difference above --max-difference, 1 a larger one, 2 error, 3 nothing to compare: no "
        "detections on either side, or no figure with a value on both.",
        [
            "evaluate data/kitti/second_sample.py --url http://127.0.0.1:8000 --model second --checkpoint second.pth",
            "evaluate faster-rcnn_r50_fpn_1x_coco --model faster-rcnn --limit 500",
            "evaluate my_config.py --archive my.mar --checkpoint my.pth",
        ],
    )
    parser.add_argument(
        "config",
        metavar="CONFIG",
        help="path or URI of the model's config, or a zoo name; its test data set and metrics are used",
    )
    parser.add_argument(
        "--dataset", metavar="CONFIG", help="config whose test_dataloader and test_evaluator are used instead"
    )
    parser.add_argument(
        "--url",
        default="127.0.0.1:8000",
        help="address of the server, host:port or http(s)://… (default: %(default)s)",
    )
    parser.add_argument("--model", metavar="NAME", help="name of the served model")
    parser.add_argument(
        "--model-version", metavar="VERSION", help="its version (default: the server's choice)"
    )
    parser.add_argument(
        "--archive",
        metavar="FILE",
        help="path or URI of an archive to run in this process instead of a server",
    )
    parser.add_argument(
        "--checkpoint",
        metavar="FILE",
        help="path or URI of the checkpoint of the native model to compare with",
    )
    parser.add_argument(
        "--max-difference",
        type=bounded(float, 0, 100),
        default=0.1,
        metavar="POINTS",
        help="largest difference of a figure that is no failure, points of average precision (default: %(default)g)",
    )
    parser.add_argument(
        "--limit", type=bounded(int, 1), metavar="N", help="evaluate the first N frames (default: all)"
    )
    parser.add_argument(
        "--concurrency",
        type=bounded(int, 1, 256),
        default=4,
        metavar="N",
        help="frames that are with the server at a time (default: %(default)s)",
    )
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=DictAction,
        metavar="KEY=VALUE",
        help="replace values of the config that names the data, as in upstream's tools",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="write the served predictions, as test.py --out writes native ones (.pkl)",
    )
    parser.add_argument(
        "--device",
        help="device of the native model and of --archive: cpu or cuda:N (default: cuda:0 if available)",
    )
    parser.add_argument(
        "--timeout-s",
        type=bounded(float, 0.001, unit="seconds"),
        default=120.0,
        help="timeout of a request, seconds (default: %(default)g)",
    )
    parser.add_argument("--token-file", help="file with the server's token, or TorchServe's key_file.json")
    add_checkpoint_flags(parser)
    parser.add_argument(
        "--trust-archive-code", action="store_true", help="run an archive that carries modules of its own"
    )
    return parser

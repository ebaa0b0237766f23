"""``mmdet3d-serve check-device``: compare and measure models on a device and on the CPU."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from serve.cli.entry import bounded, command_parser, stage_reporter

__all__ = ["main"]

MODELS = ("second", "pointpillars", "centerpoint", "faster-rcnn", "mask-rcnn")


def main(argv: Sequence[str] | None) -> int:
    """Check each model; returns 0 if all answers are equal and 1 if not."""
    parser = command_parser(
        "check-device",
        "Load models on the CPU and on a device and run the same frames on both: are the answers equal, how long do "
        "they take, how many operators and synchronisations are there? Prints a table and one line of JSON. Exit "
        "status: 0 equal, 1 not equal, 2 error.",
        ["check-device --device cuda:0", "check-device --device cuda:1 second model-store/mine.mar"],
    )
    parser.add_argument(
        "models",
        metavar="MODEL|ARCHIVE",
        nargs="*",
        help=f"names of models, which get random weights, or .mar files (default: {' '.join(MODELS)})",
    )
    parser.add_argument("--device", default="cuda:0", help="cpu or cuda:N (default: %(default)s)")
    parser.add_argument(
        "--seconds",
        type=bounded(float, 0, unit="seconds"),
        default=300,
        help="after so long, only compare and do not measure (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    from serve import archive, ops

    ops.install()
    import torch

    from serve.ops.device_kernels import device_kernels
    from serve.runtime.model import parse_device
    from serve.verify.device_check import DeviceCheck, check_model

    device = parse_device(args.device)
    started = time.monotonic()
    report = stage_reporter()
    name = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    )
    result = DeviceCheck(
        str(device),
        name,
        torch.__version__,
        "",
        str(device) if device.type == "cuda" else "a stand-in for CUDA",
    )
    for model in args.models or MODELS:
        with tempfile.TemporaryDirectory(prefix="mmdet3d-serve-check-") as place:
            folder = Path(place) / "opened"
            report(f"archiving {model}")
            archive.extract(_archived(model, Path(place)), folder)
            report(f"checking {model}")
            measure = time.monotonic() - started < args.seconds
            result.models.append(check_model(archive.open_directory(folder), folder, device, measure=measure))
            print(f"{model}: {'equal' if result.models[-1].ok else 'NOT equal'}", file=sys.stderr)
    result.kernels = ops.kernels_in_use()
    if device.type == "cuda":
        result.device_kernels = device_kernels(device.index or 0).description
    print(result.table())
    print(result.json_line(), flush=True)
    return 0 if all(one.ok for one in result.models) else 1


def _archived(model: str, folder: Path) -> Any:
    """Return an archive's file: a given one, or one of a model by name with random weights."""
    if model.endswith(".mar"):
        return Path(model)
    from serve import convert, zoo
    from serve.convert.random_weights import write_random_checkpoint

    config = zoo.resolve(model).config_path
    resolved = convert.resolve_config(config).config
    write_random_checkpoint(resolved, tuple(convert.configured_classes(resolved)), folder / "random.pth")
    name = Path(model).stem
    return convert.convert(convert.Conversion(config, folder / "random.pth", folder, name, device="cpu")).path

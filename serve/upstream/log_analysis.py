"""``analyze_logs``: curves of training logs, and average seconds per iteration.

Upstream's program pairs values with wrong steps as soon as a log has validations in it ("x and y must have same first
dimension", mmdetection#10314), and needs seaborn. This one reads today's logs of mmengine (``vis_data/*.json``) and the
``*.log.json`` of mmcv 1, and takes the flags of all versions of upstream's.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from serve.errors import SettingsError

__all__ = ["Log", "main", "plot_curve", "print_train_time", "read_log", "takes"]

# Values of a line that are not measured.
_PLACES = ("mode", "epoch", "iter", "step", "exp_name", "env_info", "seed")


def takes(package: str, arguments: Sequence[str]) -> bool:
    """Whether this replaces the program of `package`: of both."""
    return True


@dataclass
class Log:
    """One training log.

    Attributes:
        path: where it comes from.
        training: key → (epoch, iteration from the beginning of the training, value).
        validation: key → (epoch, or the number of the validation without epochs; value).
    """

    path: Path
    training: dict[str, list[tuple[int, int, float]]] = field(default_factory=dict)
    validation: dict[str, list[tuple[int, float]]] = field(default_factory=dict)


def read_log(path: Path) -> Log:
    """Read a log of mmengine or mmcv 1, one JSON object a line.

    Raises:
        SettingsError: the file does not exist or is no such log.
    """
    if not path.is_file():
        raise SettingsError(
            f"log {path} does not exist; mmengine writes work_dirs/NAME/TIME/vis_data/TIME.json"
        )
    log = Log(path)
    epoch, validations, offset, last = 1, 0, 0, 0
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except ValueError:
            raise SettingsError(
                f"line {number} of {path} is no JSON; the log with one object a line is vis_data/TIME.json "
                "(before mmdet 3: TIME.log.json)"
            ) from None
        if not isinstance(values, dict):
            raise SettingsError(f"line {number} of {path} is no JSON object")
        measured = _measured(values)
        if _is_validation(values):
            validations += 1
            place = int(values.get("epoch") or epoch)
            for key, value in measured.items():
                log.validation.setdefault(key, []).append((place, value))
        elif measured and ("iter" in values or "step" in values):
            epoch = int(values.get("epoch") or epoch)
            step = int(values.get("step") or values["iter"])
            if "step" not in values and step <= last and "epoch" in values:
                offset += last  # mmcv counts from 1 in every epoch
            last = step
            for key, value in measured.items():
                log.training.setdefault(key, []).append((epoch, offset + step, value))
    if not log.training and not log.validation:
        raise SettingsError(f"{path} has no losses and no metrics; is it the log of a training?")
    return log


def _measured(values: dict[str, Any]) -> dict[str, float]:
    return {
        key: float(value)
        for key, value in values.items()
        if key not in _PLACES and isinstance(value, int | float) and not isinstance(value, bool)
    }


def _is_validation(values: dict[str, Any]) -> bool:
    """Whether a line is of a validation: mmcv names the mode, mmengine's lines lack the loss and learning rate."""
    if "mode" in values:
        return str(values["mode"]) == "val"
    return "lr" not in values and "loss" not in values and any("/" in key for key in values)


def series_of(log: Log, key: str) -> tuple[list[float], list[float], bool]:
    """Places and values of a key, and whether they are of validations.

    A key may lack its prefix: ``bbox_mAP`` finds ``coco/bbox_mAP``, ``KITTI/Car_3D_moderate_strict`` finds ``Kitti
    metric/pred_instances_3d/KITTI/Car_3D_moderate_strict``.

    Raises:
        SettingsError: the log lacks it, or has several such keys.
    """
    kinds = (log.training, log.validation)
    exact = [key] if any(key in kind for kind in kinds) else []
    ends = sorted({name for kind in kinds for name in kind if name.endswith(f"/{key}")})
    found = exact or ends
    if not found:
        known = sorted({*log.training, *log.validation})
        raise SettingsError(f"{log.path} has no {key}; it has {', '.join(known)}")
    if len(found) > 1:
        raise SettingsError(f"{key} is ambiguous in {log.path}: {', '.join(found)}")
    if found[0] in log.training:
        rows = log.training[found[0]]
        return [float(step) for _, step, _ in rows], [value for *_, value in rows], False
    pairs = log.validation[found[0]]
    return [float(place) for place, _ in pairs], [value for _, value in pairs], True


def plot_curve(logs: Sequence[Log], args: argparse.Namespace) -> None:
    """Plot keys of logs into ``args.out``, or a window without it."""
    import matplotlib

    if args.backend or args.out:
        matplotlib.use(args.backend or "agg")
    from matplotlib import pyplot

    labels = args.legend or [f"{log.path}_{key}" for log in logs for key in args.keys]
    if len(labels) != len(logs) * len(args.keys):
        raise SettingsError(
            f"--legend names {len(labels)} curves, but {len(logs)} logs with {len(args.keys)} keys have "
            f"{len(logs) * len(args.keys)}"
        )
    style = f"seaborn-v0_8-{args.style}"
    with pyplot.style.context(style if style in pyplot.style.available else "default"):
        figure, axes = pyplot.subplots()
        remaining = iter(labels)
        for log in logs:
            for key in args.keys:
                places, values, is_validation = series_of(log, key)
                print(f"plot curve of {log.path}, metric is {key}, {len(values)} values")
                if args.evaluation and not is_validation:
                    raise SettingsError(f"{key} of {log.path} is of the training; leave out --mode eval")
                axes.set_xlabel("epoch" if is_validation else "iter")
                marks = {"marker": "o"} if is_validation else {"linewidth": 0.8}
                axes.plot(places, values, label=next(remaining), **marks)
        axes.legend()
        if args.title:
            axes.set_title(args.title)
        if args.out is None:
            pyplot.show()
        else:
            figure.savefig(args.out)
            print(f"save curve to: {args.out}")
        pyplot.close(figure)


def print_train_time(logs: Sequence[Log], args: argparse.Namespace) -> None:
    """Print the average seconds per iteration of every epoch's extremes, and of all."""
    for log in logs:
        epochs: dict[int, list[float]] = {}
        for epoch, _, value in log.training.get("time", ()):
            epochs.setdefault(epoch, []).append(value)
        if not args.include_outliers:  # the first line of an epoch includes the start of the workers
            epochs = {epoch: values[1:] for epoch, values in epochs.items() if values[1:]}
        if not epochs:
            raise SettingsError(
                f"{log.path} has fewer than two lines with a time in every epoch; log more often "
                "(--cfg-options default_hooks.logger.interval=10), or pass --include-outliers"
            )
        means = {epoch: sum(values) / len(values) for epoch, values in epochs.items()}
        slowest, fastest = max(means, key=means.__getitem__), min(means, key=means.__getitem__)
        mean = sum(means.values()) / len(means)
        spread = math.sqrt(sum((value - mean) ** 2 for value in means.values()) / len(means))
        print(f"-----Analyze train time of {log.path}-----")
        print(f"slowest epoch {slowest}, average time is {means[slowest]:.4f} s/iter")
        print(f"fastest epoch {fastest}, average time is {means[fastest]:.4f} s/iter")
        print(f"time std over epochs is {spread:.4f}")
        print(f"average iter time: {mean:.4f} s/iter\n")


def main(arguments: Sequence[str], program: str) -> int:
    """Parse the arguments, read the logs, plot or print."""
    parser = argparse.ArgumentParser(
        program, description="Plot training logs, or print seconds per iteration."
    )
    tasks = parser.add_subparsers(dest="task", required=True)
    plot = tasks.add_parser("plot_curve", help="plot losses or metrics")
    plot.add_argument(
        "json_logs", nargs="+", type=Path, help="vis_data/TIME.json, before mmdet 3 TIME.log.json"
    )
    plot.add_argument("--keys", nargs="+", default=["bbox_mAP"], help="what to plot (default: bbox_mAP)")
    plot.add_argument("--title", help="title of the picture")
    plot.add_argument("--legend", nargs="+", help="names of the curves: one per log and key")
    plot.add_argument("--backend", help="backend of matplotlib")
    plot.add_argument("--style", default="dark", help="dark, white, darkgrid, whitegrid or ticks")
    plot.add_argument("--out", help="file to write: png, pdf, svg")
    plot.add_argument("--mode", choices=("train", "eval"), help="eval: the keys must be of validations")
    plot.add_argument("--eval", action="store_true", help="as --mode eval")
    for former in ("--interval", "--eval-interval", "--start-epoch"):
        plot.add_argument(former, help="not needed: the log says which epoch a value is of")
    time = tasks.add_parser("cal_train_time", help="average seconds per iteration")
    time.add_argument("json_logs", nargs="+", type=Path, help="logs as for plot_curve")
    time.add_argument("--include-outliers", action="store_true", help="include the first line of every epoch")
    args = parser.parse_args(list(arguments))
    logs = [read_log(path) for path in args.json_logs]
    if args.task == "plot_curve":
        args.evaluation = args.eval or args.mode == "eval"
        plot_curve(logs, args)
    else:
        print_train_time(logs, args)
    return 0

"""Upstream's demo and deployment scripts by their names, as commands of today.

The wheels of mmdet and mmdet3d have neither ``demo/`` nor ``tools/deployment/``; pages print both.
"""

from __future__ import annotations

import argparse
import importlib
import shlex
import sys
from collections.abc import Sequence
from itertools import takewhile
from pathlib import PurePosixPath

from serve.errors import SettingsError

__all__ = ["FORMER", "run_former"]

# Script → positional arguments of `predict` that it takes, in its order.
_DEMOS: dict[str, tuple[str, ...]] = {
    "image_demo": ("source", "model", "checkpoint"),
    "video_demo": ("source", "model", "checkpoint"),
    "video_gpuaccel_demo": ("source", "model", "checkpoint"),
    "webcam_demo": ("model", "checkpoint"),
    "pcd_demo": ("source", "model", "checkpoint"),
}
_SHOWN = {"source": "FILE", "model": "CONFIG", "checkpoint": "[CHECKPOINT]"}
_DEPLOYMENT = {
    "mmdet2torchserve": "archive",
    "mmdet3d2torchserve": "archive",
    "test_torchserver": "verify",
}
_WITH_CALIBRATION = ("mono_det_demo", "multi_modality_demo")
FORMER: dict[str, str] = {
    **dict.fromkeys((*_DEMOS, *_WITH_CALIBRATION), "predict"),
    **_DEPLOYMENT,
    "async_benchmark": "serve.predict.AsyncPredictor",
}
"""Name of a former script, without folder and ``.py`` → the command of today."""


def run_former(name: str, argv: Sequence[str]) -> int | None:
    """Run what a former script did; None if `name` is none.

    Args:
        name: of the script, with or without folder and ``.py``.
        argv: its arguments; options of today's command work too.

    Raises:
        SettingsError: arguments are missing, or no command takes these.
    """
    script = PurePosixPath(name).name.removesuffix(".py")
    if script not in FORMER:
        return None
    if script in _DEMOS:
        return _run("predict", _demo(script, argv), script)
    if script == "test_torchserver":
        return _run("verify", list(argv), script)
    if script in _DEPLOYMENT:
        from serve.cli.archive import to_torchserve

        package = "mmdet" if script.startswith("mmdet2") else "mmdet3d"
        print(f"note: '{script}' is now: mmdet3d-serve archive", file=sys.stderr)
        return to_torchserve(argv, package)
    if script in _WITH_CALIBRATION:
        raise SettingsError(
            f"'{script}' is now: mmdet3d-serve predict FOLDER --model CONFIG --checkpoint CHECKPOINT; FOLDER has a "
            "folder per frame with its images, calibration and cloud (docs/answers.md, frames of several parts)"
        )
    raise SettingsError(
        f"'{script}' measured the asynchronous calls of 2.x; today's are serve.predict.AsyncPredictor (docs/predict.md)"
    )


def _run(command: str, arguments: list[str], script: str) -> int:
    print(f"note: '{script}' is now: mmdet3d-serve {command} {shlex.join(arguments)}", file=sys.stderr)
    code: int = importlib.import_module(f"serve.cli.{command}").main(arguments)
    return code


def _demo(script: str, argv: Sequence[str]) -> list[str]:
    """Arguments of ``predict`` for those of a demo."""
    positional = _DEMOS[script]
    # The files come first, as pages print them: a value of an option is not mistaken for a checkpoint.
    files = list(takewhile(lambda word: not word.startswith("-"), argv))
    usage = " ".join(_SHOWN[name] for name in positional)
    parser = argparse.ArgumentParser(
        f"mmdet3d-serve tools {script}", usage=f"%(prog)s {usage} [OPTION …]", allow_abbrev=False,
        epilog="Options of `mmdet3d-serve predict` work too.",
    )  # fmt: skip
    parser.add_argument("--weights", help="checkpoint")
    parser.add_argument("--score-thr", "--pred-score-thr", help="lowest score")
    parser.add_argument("--out", "--out-file", help="picture or video to write")
    parser.add_argument("--out-dir", help="folder for predictions and pictures")
    parser.add_argument("--camera-id", default="0", help="number of the camera")
    parser.add_argument(
        "--async-test", action="store_true", help="read and decode while the network computes"
    )
    for flag in ("--show", "--nvdecode", "--snapshot"):
        parser.add_argument(flag, action="store_true", help="without effect")
    parser.add_argument("--wait-time", type=float, help="without effect")
    found, rest = parser.parse_known_args(list(argv[len(files) :]))
    if not len(positional) - 1 <= len(files) <= len(positional):
        raise SettingsError(f"{script} needs {usage}, then options; got {shlex.join(files) or 'none'}")
    given = dict(zip(positional, files, strict=False))
    if found.show:
        print(
            "note: '--show' opens no window; --out FILE.png or FILE.mp4 writes what it showed",
            file=sys.stderr,
        )
    if found.nvdecode:
        print("note: '--nvdecode' has no effect: threads of the CPU decode", file=sys.stderr)
    words = [given.get("source", found.camera_id), "--model", given["model"]]
    checkpoint = given.get("checkpoint", found.weights)
    words += ["--checkpoint", checkpoint] if checkpoint else []
    words += ["--score-thr", found.score_thr] if found.score_thr else []
    words += ["--batch-size", "4"] if found.async_test else []
    if found.out:
        words += ["--out", found.out]
    elif found.out_dir:
        words += ["--out", found.out_dir, "--format", "json,picture"]
    return [*words, *rest]

"""Command ``mmdet3d-serve``: one module per subcommand, imported on use.

Lazy imports keep ``mmdet3d-serve gateway`` free of torch, which its image lacks.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from serve import __version__
from serve.cli.entry import PROGRAM, run

__all__ = ["COMMANDS", "main"]

# Commands that run without torch and models; with the extra `gateway` they have all they import.
_OF_GATEWAY = frozenset({"fetch", "gateway", "label-studio", "pack", "push", "stop"})

# Subcommand to module and summary, in the order of first use.
COMMANDS = {
    "demo": ("serve.cli.demo", "archive and serve the demo SECOND, and send it a frame"),
    "archive": (
        "serve.cli.archive",
        "create a .mar archive of a zoo model or of your own config and checkpoint",
    ),
    "predict": ("serve.cli.predict", "predict images, clouds, videos or buckets, with or without a server"),
    "serve": ("serve.cli.serve", "serve archives with TorchServe and the gateway in the foreground"),
    "stop": ("serve.cli.stop", "stop what 'serve' or 'demo' left running"),
    "verify": ("serve.cli.verify", "compare a served model with native mmdet / mmdet3d inference"),
    "evaluate": ("serve.cli.evaluate", "average precision of a served model on a data set, beside native"),
    "bulk": ("serve.cli.bulk", "predict many frames on all cores or GPUs, resumable, in parts"),
    "compare": ("serve.cli.compare", "what changes from one version of a model to another"),
    "reference": (
        "serve.cli.reference",
        "record in an archive what its model sees, for alerts when that changes",
    ),
    "sample-data": ("serve.cli.sample_data", "write a small synthetic data set in KITTI's or COCO's layout"),
    "check-device": ("serve.cli.check_device", "compare and measure models on a GPU and on the CPU"),
    "draw": ("serve.cli.draw", "draw detections on a point cloud or an image"),
    "zoo": ("serve.cli.zoo", "list the models of the zoo by name"),
    "fetch": ("serve.cli.fetch", "fetch the archives of a bucket into a folder"),
    "push": ("serve.cli.push", "verify archives and upload them to a bucket"),
    "pack": ("serve.cli.pack", "pack a folder of frames into one FFRecord file"),
    "train": ("serve.cli.train", "train a detector with upstream's own program"),
    "test": ("serve.cli.test", "test a detector on a data set: COCO, VOC, KITTI, nuScenes, …"),
    "tools": ("serve.cli.tools", "run upstream's other programs: logs, complexity, data sets, …"),
    "label-studio": ("serve.cli.label_studio", "predict for Label Studio: an ML backend for boxes and masks"),
    "gateway": ("serve.cli.gateway", "run the gateway in front of a TorchServe elsewhere"),
}
# Former names, accepted for one version.
RENAMED = {"up": ["serve", "--container"], "fetch-models": ["fetch"]}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the subcommand that the first argument names; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in RENAMED:
        now = RENAMED[arguments[0]]
        print(
            f"warning: '{arguments[0]}' is now '{' '.join(now)}'; the old name will be removed in 0.3",
            file=sys.stderr,
        )
        arguments[:1] = now
    name = arguments[0] if arguments else "--help"
    if name in ("-V", "--version"):
        print(f"{PROGRAM} {__version__}")
        return 0
    if name not in COMMANDS:
        listed = "\n".join(f"  {known:<12} {summary}" for known, (_, summary) in COMMANDS.items())
        usage = f"usage: {PROGRAM} COMMAND [OPTION …]\n\ncommands:\n{listed}\n\n"
        usage += f"{PROGRAM} COMMAND --help lists the options."
        asked = name in ("-h", "--help")
        if not asked:
            print(f"error: unknown command '{name}'", file=sys.stderr)
        print(usage, file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    try:
        module = importlib.import_module(COMMANDS[name][0])
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "serve", "handlers"):
            raise
        extra = "gateway" if name in _OF_GATEWAY else "models"
        print(
            f"error: {PROGRAM} {name} needs the Python package {package}, which the extra {extra} brings: "
            f"pip install '{PROGRAM}[{extra}]', or `make setup` in a checkout",
            file=sys.stderr,
        )
        return 2
    return run(module.main, arguments[1:])

"""``mmdet3d-serve train``: train a detector with upstream's own program."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from serve.cli.serve import stoppable
from serve.upstream import tools

__all__ = ["main", "show_help"]

HELP = """usage: mmdet3d-serve train CONFIG [OPTION …]

Train a detector with the train.py of the installed mmdet or mmdet3d, whichever the config is for.
CONFIG is a name of the zoo (second, faster-rcnn), a path of upstream's (configs/…), a file or a URI.

  --gpus N              processes on this machine (torchrun); without GPUs they are processes on the CPU
  --nnodes N --node-rank R --master-addr HOST --master-port PORT
                        one of several machines: the same command on each, with its rank
  --trust-checkpoint    unpickle any type in checkpoints, which can run code

examples:
  mmdet3d-serve train second --work-dir work
  mmdet3d-serve train my_config.py --gpus 2 --auto-scale-lr --resume

Flags of mmdet 2.x and mmdet3d 0.x (--resume-from, --no-validate, --options, …) are translated. Upstream's own:
"""


def main(argv: Sequence[str] | None) -> int:
    """Run upstream's train.py; returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        return show_help("train", HELP)
    with stoppable():
        return tools.run("train", arguments)


def show_help(tool: str, text: str) -> int:
    """Print this project's help and then upstream's."""
    print(text, flush=True)
    try:
        return tools.run(tool, ["--help"], package="mmdet")
    except SystemExit as error:
        return int(error.code or 0)

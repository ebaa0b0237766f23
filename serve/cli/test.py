"""``mmdet3d-serve test``: test a detector on a data set with upstream's own program."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from serve.cli.serve import stoppable
from serve.cli.train import show_help
from serve.upstream import tools

__all__ = ["main"]

HELP = """usage: mmdet3d-serve test CONFIG CHECKPOINT [OPTION …]

Test a detector with the test.py of the installed mmdet or mmdet3d, whichever the config is for.
CONFIG is a name of the zoo (second, faster-rcnn), a path of upstream's (configs/…), a file or a URI; configs of 2.x
and 0.x are converted.

  --gpus N              processes on this machine (torchrun); without GPUs they are processes on the CPU
  --nnodes N --node-rank R --master-addr HOST --master-port PORT
                        one of several machines: the same command on each, with its rank
  --allow-partial       test although weights are missing or left over
  --trust-checkpoint    unpickle any type in the checkpoint, which can run code

examples:
  mmdet3d-serve test second second.pth --work-dir work
  mmdet3d-serve test mask-rcnn mask_rcnn.pth --eval bbox segm --options classwise=True --out results.pkl

Flags of mmdet 2.x and mmdet3d 0.x (--eval, --options, --format-only, …) are translated. Upstream's own:
"""


def main(argv: Sequence[str] | None) -> int:
    """Run upstream's test.py; returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        return show_help("test", HELP)
    with stoppable():
        return tools.run("test", arguments)

"""``mmdet3d-serve tools``: run the other programs of the installed mmdet and mmdet3d."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from serve.cli.former_programs import FORMER, run_former
from serve.cli.serve import stoppable
from serve.upstream import tools
from serve.upstream.tool_list import all_tools

__all__ = ["main"]

HELP = """usage: mmdet3d-serve tools NAME [OPTION …]

Run a program of the installed mmdet or mmdet3d, with its own arguments; NAME --help shows them. Of a program that both
have, the one is taken that the config among the arguments is for; mmdet3d::NAME names the package.
A path as upstream's pages write it works too: tools/analysis_tools/get_flops.py.

examples:
  mmdet3d-serve tools get_flops second --shape 40000 4
  mmdet3d-serve tools analyze_logs plot_curve log.json --keys loss_cls --out losses.pdf
  mmdet3d-serve tools create_data kitti --root-path data/kitti --out-dir data/kitti

programs:
"""
LAUNCHERS = {
    "dist_train": "CONFIG GPUS [OPTION …]: train in several processes (variables NNODES, NODE_RANK, PORT, MASTER_ADDR)",
    "dist_test": "CONFIG CHECKPOINT GPUS [OPTION …]: test in several processes",
    "slurm_train": "PARTITION JOB_NAME CONFIG WORK_DIR [OPTION …]: train on a Slurm cluster (variable GPUS)",
    "slurm_test": "PARTITION JOB_NAME CONFIG CHECKPOINT [OPTION …]: test on a Slurm cluster",
}


def main(argv: Sequence[str] | None) -> int:
    """List the programs, or run one; returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] not in ("-h", "--help"):
        code = run_former(arguments[0], arguments[1:])
        if code is not None:
            return code
        with stoppable():
            return tools.run(arguments[0], arguments[1:])
    print(HELP, end="")
    for tool in all_tools():
        print(f"  {tool.short_name:<31} {tool.summary} ({', '.join(tool.packages)})")
    for name, summary in LAUNCHERS.items():
        print(f"  {name:<31} {summary}")
    print("\nUpstream's demo and deployment scripts run too, as the commands that took their place:")
    for name, command in FORMER.items():
        print(f"  {name:<31} {command}")
    return 0

"""``python -m tools.bench native-env``: an environment with upstream's compiled stack."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from serve.cli.entry import bounded

__all__ = ["main"]

ROOT = Path(__file__).resolve().parents[3]


def main(argv: Sequence[str] | None) -> int:
    """Parse the command line and create the environment for ``--native-python``."""
    from importlib.metadata import version

    from tools.bench.reference import environment

    parser = argparse.ArgumentParser(
        description="Create an environment with upstream's compiled stack (mmcv from source, spconv) for "
        "`python -m tools.bench detector --native-python`. Needs a C++ compiler; takes 15 to 40 minutes on 2 cores."
    )
    parser.add_argument(
        "--folder", type=Path, default=ROOT / ".venv-native", help="target folder (default: .venv-native)"
    )
    parser.add_argument(
        "--jobs", type=bounded(int, 1), default=2, help="parallel compiler processes (default: %(default)s)"
    )
    parser.add_argument("--torch-index-url", metavar="URL", help="package index for torch")
    args = parser.parse_args(argv)
    with tqdm(unit="file", file=sys.stderr) as bar:
        python = environment.build(
            args.folder.resolve(),
            ROOT / "requirements",
            torch_version=version("torch").partition("+")[0],
            torch_index_url=args.torch_index_url,
            jobs=args.jobs,
            progress=lambda step, done, total: _step(bar, step, done, total),
        )
    print(python)
    return 0


def _step(bar: tqdm[Any], step: str, done: int, total: int) -> None:
    """Show the step and, if known, its progress."""
    bar.set_description(step)
    bar.total = total or None
    bar.n = done
    bar.refresh()

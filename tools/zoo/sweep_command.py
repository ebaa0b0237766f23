"""``python -m tools.zoo sweep``: try one model of every family and write the page."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from serve.cli.entry import bounded
from serve.errors import ModelLookupError
from serve.settings import Settings

__all__ = ["main"]

PAGE = Path("docs/coverage.md")
NAMED = ("torch", "mmengine", "mmcv-lite", "mmdet", "mmdet3d")


def main(argv: Sequence[str] | None) -> int:
    """Parse the command line, try what has no result yet, write the page."""
    parser = argparse.ArgumentParser(
        description="Try one model of every family of the mmdet and mmdet3d zoos with random weights (convert, "
        "load, run, compare a batch with its frames and with upstream's own inference) and write docs/coverage.md. "
        "Broken off, it goes on where it was."
    )
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="NAME",
        help="a family, as in atss or mmdet/atss; repeatable",
    )
    parser.add_argument(
        "--again", action="append", default=[], metavar="STATUS",
        help="try families with this status again, as in fails; 'all' for every one; repeatable",
    )  # fmt: skip
    parser.add_argument(
        "--jobs", type=bounded(int, 1), default=1, help="models tried at a time (default: %(default)s)"
    )
    parser.add_argument(
        "--served",
        action="store_true",
        help="compare the answer of a real TorchServe with upstream's, as verify does; families that work but were not "
        "served yet are tried again",
    )
    parser.add_argument(
        "--timeout-s",
        type=bounded(float, 1, unit="seconds"),
        default=900,
        help="per model, seconds (default: %(default)s)",
    )
    parser.add_argument(
        "--memory-mb",
        type=bounded(int, 1, unit="MiB"),
        default=8192,
        help="per model, MiB (default: %(default)s)",
    )
    parser.add_argument(
        "--results", type=Path, help="JSON lines, appended to (default: zoo-coverage/ in the cache folder)"
    )
    parser.add_argument("--page", type=Path, default=PAGE, help="the page to write (default: %(default)s)")
    args = parser.parse_args(argv)
    from tools.zoo.families import families
    from tools.zoo.report import counts, page
    from tools.zoo.sweep import Result, Sweep, load_results

    known = families()
    results = (
        args.results or Settings.from_environment().cache_dir.expanduser() / "zoo-coverage" / "results.jsonl"
    )
    extra = importlib.util.find_spec("mmpretrain") is not None
    wanted = [family for family in known if not args.only or {family.key, family.name} & set(args.only)]
    if not wanted:
        raise ModelLookupError(
            f"no family is called {', '.join(args.only)}; they are folders of the zoos' configs"
        )
    latest = {result.family: result for result in load_results(results) if extra or not result.extra}
    again = set(args.again)

    def due(key: str) -> bool:
        result = latest.get(key)
        if result is None or "all" in again or result.probe.status in again:
            return True
        if args.served and result.probe.status == "works" and not result.probe.served:
            return True
        # What worked as set up, or needs no package, comes out the same with more packages.
        return extra and not result.extra and result.probe.status == "needs package"

    left = [family for family in wanted if family.configs and due(family.key)]
    sweep = Sweep(
        results,
        extra=extra,
        timeout_s=args.timeout_s,
        memory_mb=args.memory_mb,
        jobs=args.jobs,
        served=args.served,
        commit=_commit(),
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # SIGTERM stops the probes, like Ctrl-C
    bar: tqdm[Any]
    with tqdm(total=len(left), unit="family", file=sys.stderr) as bar:

        def done(family: Any, result: Result | None) -> None:
            bar.update()
            if result is not None:
                probe = result.probe
                bar.write(
                    f"{family.key}: {probe.status} ({probe.config}, {probe.seconds:.0f} s) {probe.reason}"
                )

        sweep.run(left, done)
    found = load_results(results)
    versions = {name: importlib.metadata.version(name) for name in NAMED}
    args.page.write_text(page(known, found, versions))
    print("\n".join(counts(known, found)))
    print(f"wrote {args.page}")
    return 0


def _commit() -> str:
    """Short hash of the checked-out commit, with ``+`` if sources differ from it; empty without git."""
    git = ("git", "-C", str(Path(__file__).parent))
    try:
        commit, changed = (
            subprocess.run([*git, *command], capture_output=True, text=True, check=True).stdout.strip()
            for command in (
                ("rev-parse", "--short", "HEAD"),
                ("status", "--porcelain", "--", ":/serve", ":/tools"),
            )
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return f"{commit}+" if changed else commit

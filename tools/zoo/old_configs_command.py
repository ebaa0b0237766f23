"""``python -m tools.zoo old-configs``: convert and build the configs of an unpacked old release."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from serve.cli.entry import bounded
from serve.errors import ServeError

__all__ = ["Outcome", "choose_configs", "main", "try_config"]


class Outcome(NamedTuple):
    """What became of one config.

    Attributes:
        config: its path below ``configs``.
        reason: why it was rejected; empty if its network was built and its frames are known.
    """

    config: str
    reason: str


def choose_configs(folder: Path, each: int) -> Iterator[Path]:
    """Yield the first configs of every family below `folder`, a release or its ``configs``.

    Args:
        folder: an unpacked source or binary distribution, or a checkout.
        each: most configs of a family.
    """
    roots = [root for root in sorted(folder.rglob("configs")) if (root / "_base_").is_dir()]
    roots = [folder] if (folder / "_base_").is_dir() else roots
    for root in roots:
        for family in sorted(path for path in root.iterdir() if path.is_dir() and path.name[0] not in "_."):
            configs = sorted(path for path in family.rglob("*.py") if path.name[0] != "_")
            yield from configs[:each]


def try_config(config: Path) -> Outcome:
    """Read a config as a conversion does, derive its frames and build its network without weights."""
    from serve.convert.classes import check_against_head, find_class_names
    from serve.convert.config import resolve_config
    from serve.runtime.model import build_network
    from serve.runtime.pipeline import InputPipeline

    name = f"{config.parent.name}/{config.name}"
    try:
        resolved = resolve_config(config).config
        named = find_class_names(resolved)
        check_against_head(named, resolved["model"])
        InputPipeline(resolved)
        build_network(resolved, named.names)
    except ServeError as error:
        return Outcome(name, " ".join(str(error).split()))
    return Outcome(name, "")


def main(argv: Sequence[str] | None) -> int:
    """Parse the command line, try the configs, print one line for each that is rejected."""
    parser = argparse.ArgumentParser(
        description="Convert configs of mmdet 2.x or mmdet3d 0.x and build their networks, without weights. Exit "
        "status: 0, also if configs are rejected; 1 if one raised what is no error of the project's; 2 no configs."
    )
    parser.add_argument("folder", type=Path, help="an unpacked release, or its folder of configs")
    parser.add_argument(
        "--each", type=bounded(int, 1), default=2, help="configs of each family (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    configs = list(choose_configs(args.folder, args.each))
    if not configs:
        print(f"error: {args.folder} has no configs with a _base_ folder beside them", file=sys.stderr)
        return 2
    outcomes: list[Outcome] = []
    failures = 0
    for config in tqdm(configs, unit="config"):
        try:
            outcomes.append(try_config(config))
        except Exception as error:  # the finding of this command
            failures += 1
            tqdm.write(f"failed    {config.parent.name}/{config.name}: {type(error).__name__}: {error}")
            continue
        if outcomes[-1].reason:
            tqdm.write(f"rejected  {outcomes[-1].config}: {outcomes[-1].reason[:200]}")
    families = {config.parent for config in configs}
    built = {outcome.config.partition("/")[0] for outcome in outcomes if not outcome.reason}
    print(
        f"{sum(not outcome.reason for outcome in outcomes)} of {len(configs)} configs built, of {len(built)} of "
        f"{len(families)} families; {sum(bool(outcome.reason) for outcome in outcomes)} rejected, {failures} failed"
    )
    return 1 if failures else 0

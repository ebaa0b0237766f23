"""Parsers, progress lines, download cache and exit codes shared by all commands.

Exit codes: 0 success, 1 negative result (a mismatch), 2 user error, 3 nothing was proved, 130 Ctrl-C, 141 broken pipe.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
import textwrap
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from serve import ops
from serve.errors import ServeError

if TYPE_CHECKING:
    from serve.storage import Cache

__all__ = [
    "add_checkpoint_flags",
    "add_format_flags",
    "bounded",
    "command_parser",
    "open_cache",
    "run",
    "stage_reporter",
]

PROGRAM = "mmdet3d-serve"


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Formatter that keeps the line breaks of descriptions and examples."""


def command_parser(name: str, description: str, examples: Sequence[str] = ()) -> argparse.ArgumentParser:
    """Create the parser of ``mmdet3d-serve NAME``.

    Args:
        name: subcommand.
        description: one paragraph, wrapped here.
        examples: command lines shown below the options, without the program's name.
    """
    shown = "\n".join(f"  {PROGRAM} {example}" for example in examples)
    return argparse.ArgumentParser(
        prog=f"{PROGRAM} {name}",
        description=textwrap.fill(description, 100),
        epilog=f"examples:\n{shown}" if shown else None,
        formatter_class=_HelpFormatter,
    )


def add_checkpoint_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of every command that reads a checkpoint: class names, and what of the file is accepted."""
    parser.add_argument(
        "--classes",
        metavar="A,B|FILE",
        help="class names by label, or a file with one per line (default: those of checkpoint or config)",
    )
    parser.add_argument(
        "--allow-partial", action="store_true", help="continue when weights are missing or unexpected"
    )
    parser.add_argument(
        "--trust-checkpoint",
        action="store_true",
        help="unpickle any type in the checkpoint, which can run code",
    )


def add_format_flags(parser: argparse.ArgumentParser) -> None:
    """Add what KITTI's labels and COCO's results need besides predictions."""
    parser.add_argument(
        "--calib",
        metavar="PATH",
        help="for kitti: folder of KITTI's calib/*.txt or of JSON, or one file; a path or s3://…",
    )
    parser.add_argument(
        "--image-size",
        type=_size,
        metavar="WxH",
        help="for kitti: size of the images in pixels, such as 1242x375",
    )
    parser.add_argument(
        "--annotations",
        type=Path,
        metavar="FILE",
        help="for coco: annotation file with the ids of images and classes",
    )


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,5})[x,](\d{1,5})", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"must be WIDTHxHEIGHT, such as 1242x375, got {text!r}")
    return int(found[1]), int(found[2])


def bounded(
    kind: type[int] | type[float], low: float, high: float = math.inf, unit: str = ""
) -> Callable[[str], float]:
    """Create a ``type`` of `argparse` that accepts finite numbers from `low` to `high`, both included.

    Args:
        kind: `int` or `float`.
        low: least value.
        high: largest value.
        unit: shown in the message about another value, such as ``pixels``.
    """
    wanted = "a whole number" if kind is int else "a number"
    wanted += f" of at least {low:g}" + (f" and at most {high:g}" if high < math.inf else "")
    wanted += f" ({unit})" if unit else ""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and low <= value <= high):
            raise argparse.ArgumentTypeError(f"must be {wanted}, got {text!r}")
        return value

    return parse


def stage_reporter() -> Callable[[str], None]:
    """Create a function that prints the stages of a command to stderr, with the seconds since this call."""
    started = time.perf_counter()

    def report(stage: str) -> None:
        print(f"[{time.perf_counter() - started:5.1f} s] {stage}", file=sys.stderr, flush=True)

    return report


def open_cache(folder: Path | None = None) -> Cache:
    """Cache for downloads in `folder`, or in the configured folder if None; its bound is the configured one."""
    from serve.settings import Settings
    from serve.storage import Cache

    settings = Settings.from_environment()
    return Cache(folder or settings.cache_dir, settings.cache_max_bytes)


def run(command: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None) -> int:
    """Run `command` with the configured kernels; map its exceptions to an exit code."""
    from serve.settings import Settings

    try:
        settings = Settings.from_environment()
        ops.install(settings.ops, cache_dir=settings.cache_dir)
        return command(argv)
    except ServeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of the pipe (head, less) has exited.
        sys.stderr.close()
        return 141
    except OSError as error:
        print(f"error: {error.filename or 'system'}: {error.strerror or error}", file=sys.stderr)
        return 2
    except Exception:
        # Python itself would end with 1, by which commands say that they have done their work and found something.
        traceback.print_exc()
        return 2

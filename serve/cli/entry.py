"""Map exceptions to exit codes, and make the parsers of all commands alike.

Exit codes: 0 done, 1 the command's own "no" (a mismatch), 2 a mistake of the user, 130 Ctrl-C, 141 broken pipe.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Callable, Sequence

from serve import ops
from serve.errors import ServeError
from serve.settings import Settings

__all__ = ["command_parser", "run"]

PROGRAM = "mmdet3d-serve"


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of descriptions and examples."""


def command_parser(name: str, description: str, examples: Sequence[str] = ()) -> argparse.ArgumentParser:
    """Make the parser of ``mmdet3d-serve NAME``.

    Args:
        name: subcommand.
        description: one paragraph; it is wrapped here.
        examples: command lines shown below the options, without the program's name.
    """
    shown = "\n".join(f"  {PROGRAM} {example}" for example in examples)
    return argparse.ArgumentParser(
        prog=f"{PROGRAM} {name}",
        description=textwrap.fill(description, 100),
        epilog=f"examples:\n{shown}" if shown else None,
        formatter_class=_HelpFormatter,
    )


def run(command: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None) -> int:
    """Run `command` with the kernels the environment asks for, and map what it raises to an exit code."""
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
        # The reader (head, less) has gone; nothing more can be printed.
        sys.stderr.close()
        return 141
    except OSError as error:
        print(f"error: {error.filename or 'system'}: {error.strerror or error}", file=sys.stderr)
        return 2

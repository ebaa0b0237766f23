"""Dispatch of ``python -m tools.bench|zoo|demo NAME``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence

from serve.cli import run

__all__ = ["dispatch", "replace_renamed"]


def dispatch(program: str, commands: Mapping[str, tuple[str, str]]) -> int:
    """Run the command that the first argument names; returns the exit code.

    Args:
        program: shown in the usage.
        commands: name to (module with a ``main(argv)``, summary).
    """
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name not in commands:
        listed = "\n".join(f"  {known:<18} {summary}" for known, (_, summary) in commands.items())
        asked = name in ("-h", "--help")
        if not asked:
            print(f"error: unknown name '{name}'", file=sys.stderr)
        print(f"usage: {program} NAME [OPTION …]\n\n{listed}", file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    module, _ = commands[name]
    arguments = sys.argv[2:]
    sys.argv[0] = f"{program} {name}"  # argparse's name of the program
    return run(importlib.import_module(module).main, arguments)


def replace_renamed(argv: Sequence[str] | None, renamed: Mapping[str, str]) -> list[str]:
    """Replace former names of flags and values by the present ones, with a warning on standard error.

    Args:
        argv: arguments; None for those of the process.
        renamed: former to present name; an entry is removed one version after the renaming.
    """
    arguments = []
    for argument in sys.argv[1:] if argv is None else argv:
        name, equals, value = argument.partition("=")
        if name in renamed:
            print(
                f"warning: {name} is now {renamed[name]}; the old name will be removed in 0.3",
                file=sys.stderr,
            )
        arguments.append(f"{renamed.get(name, name)}{equals}{value}")
    return arguments

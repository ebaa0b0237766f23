"""How every command of ours ends: a sentence and 2 for a mistake, 130 for Ctrl-C, its own code otherwise.

Knows nothing about any command.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from serve import ops
from serve.errors import ServeError
from serve.settings import Settings

__all__ = ["run"]


def run(command: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None) -> int:
    """Run `command` with the kernels the environment asks for, and turn what it raises into an exit code."""
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
        # The reader (head, less) has gone; nothing more can be told.
        sys.stderr.close()
        return 141
    except OSError as error:
        print(f"error: {error.filename or 'system'}: {error.strerror or error}", file=sys.stderr)
        return 2

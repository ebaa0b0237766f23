"""Command lines: argument parsing and printing, shared by ``tools/`` and ``python -m serve``.

The only place that prints. Knows how to ask and to tell; everything it asks for is done elsewhere.
"""

from serve.cli.entry import run

__all__ = ["run"]

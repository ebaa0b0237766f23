"""Command lines: one module per subcommand of ``mmdet3d-serve``. The only package that prints."""

from serve.cli.entry import run

__all__ = ["run"]

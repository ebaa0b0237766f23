"""Write a checkpoint of random but well-behaved weights, to try a model without its published ones."""

from __future__ import annotations

from serve.cli import run
from serve.cli.random_checkpoint import main

if __name__ == "__main__":
    raise SystemExit(run(main))

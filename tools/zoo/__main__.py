"""``python -m tools.zoo NAME``: try every family of the zoos; write random weights."""

from __future__ import annotations

from tools.commands import dispatch

COMMANDS = {
    "sweep": ("tools.zoo.sweep_command", "try one model of every family and write docs/coverage.md"),
    "random-checkpoint": (
        "tools.zoo.random_checkpoint_command",
        "write weights for trying a model out offline",
    ),
}

if __name__ == "__main__":
    raise SystemExit(dispatch("python -m tools.zoo", COMMANDS))

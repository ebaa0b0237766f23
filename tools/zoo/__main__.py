"""``python -m tools.zoo NAME``: probe every family of the zoos and old releases; write random weights."""

from __future__ import annotations

from tools.commands import dispatch

COMMANDS = {
    "sweep": ("tools.zoo.sweep_command", "probe one model of every family and write docs/coverage.md"),
    "random-checkpoint": (
        "tools.zoo.random_checkpoint_command",
        "write random weights for testing a model offline",
    ),
    "old-configs": (
        "tools.zoo.old_configs_command",
        "convert and build the configs of an unpacked old release",
    ),
}

if __name__ == "__main__":
    raise SystemExit(dispatch("python -m tools.zoo", COMMANDS))

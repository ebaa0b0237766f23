"""``python -m tools.simulation NAME``: the simulation of a service of many pods."""

from __future__ import annotations

from tools.commands import dispatch

COMMANDS = {
    "run": ("tools.simulation.commands.run", "one load on a number of pods"),
    "size": ("tools.simulation.commands.size", "fewest pods that hold a latency"),
    "check": ("tools.simulation.commands.check", "the simulation beside the serving benchmark"),
}

if __name__ == "__main__":
    raise SystemExit(dispatch("python -m tools.simulation", COMMANDS))

"""``python -m serve COMMAND``: the commands that images and manifests run. Knows their names and where they are."""

from __future__ import annotations

import importlib
import sys

from serve.cli.entry import run

# Each is imported only when it is asked for: the gateway must run where there is no torch.
COMMANDS = {
    "up": ("serve.cli.serving", "up", "serve every archive of a store, with the gateway in front"),
    "gateway": ("serve.cli.gateway", "gateway", "batch, limit and route requests to TorchServe"),
    "fetch-models": ("serve.cli.storage", "fetch_models", "bring the archives of a bucket into a folder"),
}


def main() -> int:
    """Run the command that the first argument names."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name not in COMMANDS:
        listed = "\n".join(f"  {known:<14} {text}" for known, (_, _, text) in COMMANDS.items())
        stream = sys.stdout if name in ("-h", "--help") else sys.stderr
        print(f"usage: python -m serve COMMAND [--help]\n\ncommands:\n{listed}", file=stream)
        return 0 if stream is sys.stdout else 2
    module, function, _ = COMMANDS[name]
    sys.argv[:2] = [f"python -m serve {name}"]
    return run(getattr(importlib.import_module(module), function))


if __name__ == "__main__":
    sys.exit(main())

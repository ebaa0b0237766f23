"""``publish_model`` on checkpoints as training writes them.

Upstream's program calls `torch.load`, which torch 2.6 refuses for files that mmengine wrote (mmengine#1655); mmdet3d's
also strips every letter of ".pth" from the end of the name. This one reads the file as data and writes the same parts.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from serve.errors import SettingsError
from serve.storage.hashes import sha256_of

__all__ = ["main", "publish", "takes"]

_PARTS = ("meta", "state_dict")
_HASH_CHARS = 8


def takes(package: str, arguments: Sequence[str]) -> bool:
    """Whether this replaces the program of `package`: of both."""
    return True


def main(arguments: Sequence[str], program: str) -> int:
    """Parse the arguments and publish."""
    parser = argparse.ArgumentParser(
        program, description="Keep the weights and meta of a checkpoint for publication."
    )
    parser.add_argument("in_file", help="checkpoint")
    parser.add_argument("out_file", help="file to write; the beginning of its SHA-256 is added to the name")
    parser.add_argument("--save-keys", nargs="+", default=list(_PARTS), choices=_PARTS, help="parts to keep")
    parser.add_argument(
        "--trust-checkpoint", action="store_true", help="unpickle any type, which can run code"
    )
    args = parser.parse_args(list(arguments))
    path = publish(Path(args.in_file), Path(args.out_file), args.save_keys, trust=args.trust_checkpoint)
    print(f"The published model is saved at {path}.")
    return 0


def publish(source: Path, target: Path, parts: Sequence[str] = _PARTS, *, trust: bool = False) -> Path:
    """Write the weights and meta of a checkpoint into ``NAME-XXXXXXXX.pth``.

    Args:
        source: checkpoint.
        target: name to write; its ``.pth`` is replaced.
        parts: ``meta``, ``state_dict`` or both.
        trust: unpickle any type, which can run code.

    Raises:
        CheckpointError: `source` cannot be read.
        SettingsError: the folder of `target` does not exist.
    """
    import torch

    from serve.convert.checkpoint import load_checkpoint

    if not target.parent.is_dir():
        raise SettingsError(f"the folder {target.parent} does not exist; create it")
    checkpoint = load_checkpoint(source, trust=trust)
    whole = {"meta": checkpoint.meta, "state_dict": checkpoint.state_dict}
    unfinished = target.with_name(f".{target.name}.unfinished")
    try:
        torch.save({name: whole[name] for name in parts}, unfinished)
        digest = sha256_of(unfinished)[:_HASH_CHARS]
        name = target.name.removesuffix(".pth")
        return unfinished.rename(target.with_name(f"{name}-{digest}.pth"))
    finally:
        unfinished.unlink(missing_ok=True)

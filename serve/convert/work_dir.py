"""What a training left in its folder: the resolved config and the checkpoint to use.

mmengine's runner writes the config as ``NAME.py``, checkpoints as ``epoch_N.pth`` or ``iter_N.pth``, the best of a
figure as ``best_FIGURE_epoch_N.pth``, and the name of the latest one into ``last_checkpoint``.
"""

from __future__ import annotations

import re
from pathlib import Path

from serve.errors import CheckpointError, ModelLookupError

__all__ = ["BEST", "LAST", "is_work_dir", "trained_checkpoint", "trained_config"]

_NUMBERED = re.compile(r"(?:epoch|iter)_(\d+)\.pth$")
BEST, LAST = "best", "last"


def is_work_dir(path: Path) -> bool:
    """Whether a path is a folder that looks like that of a training: with checkpoints or configs in it."""
    return path.is_dir() and any(any(path.glob(pattern)) for pattern in ("*.pth", "*.py"))


def trained_config(folder: Path) -> Path:
    """Find the config in the folder of a training.

    Raises:
        ModelLookupError: there is none, or more than one.
    """
    configs = sorted(path for path in folder.glob("*.py") if path.is_file())
    if not configs:
        raise ModelLookupError(
            f"{folder} has no config (*.py): it is no folder that a training wrote to; name the config, and the "
            "checkpoint by --checkpoint"
        )
    if len(configs) > 1:
        raise ModelLookupError(
            f"{folder} has several configs ({', '.join(path.name for path in configs)}): more than one training wrote "
            "to it; name one of them, and its checkpoint by --checkpoint"
        )
    return configs[0]


def trained_checkpoint(folder: Path, which: str | None = None) -> tuple[Path, str]:
    """Find the checkpoint in the folder of a training; returns also why this one.

    Args:
        folder: what ``--work-dir`` named.
        which: ``best`` or ``last``; None for the best checkpoint if there is one, else the last.

    Raises:
        CheckpointError: there is no such checkpoint, or several are the best of a figure each.
    """
    best = sorted(folder.glob("best_*.pth"))
    if which == BEST and not best:
        raise CheckpointError(
            f"{folder} has no best_*.pth; a training keeps one with "
            "--cfg-options default_hooks.checkpoint.save_best=auto"
        )
    if which != LAST and best:
        if len(best) > 1:
            raise CheckpointError(
                f"{folder} has the best checkpoints of several figures or trainings "
                f"({', '.join(path.name for path in best)}); name one by --checkpoint"
            )
        return best[0], "the best of the training"
    pointer = folder / "last_checkpoint"
    if pointer.is_file():
        # The path in it is that of the machine that trained.
        named = folder / Path(pointer.read_text(encoding="utf-8").strip()).name
        if named.is_file():
            return named, "the last of the training"
    numbered = {
        int(found[1]): path
        for path in folder.glob("*.pth")
        if not path.name.startswith("best_") and (found := _NUMBERED.search(path.name))
    }
    if not numbered:
        raise CheckpointError(
            f"{folder} has no checkpoint (epoch_N.pth, iter_N.pth): the training wrote none yet"
        )
    return numbered[max(numbered)], "the last of the training"

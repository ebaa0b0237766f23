"""Check whether a native sparse encoder is deterministic, with one thread and with several.

spconv's CPU kernels add to the same output from several threads without a lock, so updates are lost (a data race).
The outputs of all sparse convolutions of several runs are compared voxel by voxel.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tools.bench.reference.process import ReferenceProcess

__all__ = ["Nondeterminism", "check", "count_different"]

RUNS = 5
# Share of a layer's largest value: far above the effect of another summation order (1e-7 each), far below that of a
# lost update.
TOLERANCE = 1e-4
Layers = dict[str, tuple[npt.NDArray[Any], npt.NDArray[np.float32]]]


@dataclass(frozen=True)
class Nondeterminism:
    """Result of `check` for the layer with the most differing voxels.

    Attributes:
        threads: threads of the runs that are compared with the single-threaded run.
        layer: name of the layer.
        voxels: number of its output voxels.
        from_one_thread: by run, voxels whose features differ from those of the single-threaded run.
        from_run_before: by run from the second on, voxels that differ from those of the previous run.
        one_thread_repeats: whether two single-threaded runs were equal in every layer.
    """

    threads: int
    layer: str
    voxels: int
    from_one_thread: tuple[int, ...]
    from_run_before: tuple[int, ...]
    one_thread_repeats: bool

    def lines(self) -> tuple[str, ...]:
        """Format the lines at the end of a table."""
        first, second = (
            ", ".join(map(str, counts)) for counts in (self.from_one_thread, self.from_run_before)
        )
        return (
            f"native sparse encoder, {len(self.from_one_thread)} runs with {self.threads} threads: of {self.voxels} "
            f"voxels of {self.layer}, differing from the run with 1 thread: {first}; from the previous run: {second}",
            f"two native runs with 1 thread are {'equal' if self.one_thread_repeats else 'NOT equal'}",
        )


def check(python: Path, config: Path, checkpoint: Path, frame: Path, threads: int) -> Nondeterminism | None:
    """Run native inference several times with one and with `threads` threads (at least two) and compare.

    Returns:
        The result, or None if the model has no sparse convolution.
    """
    threads = max(2, threads)
    single = _layers(python, config, checkpoint, frame, 1, 2)
    if not single[0]:
        return None
    several = _layers(python, config, checkpoint, frame, threads, RUNS)
    wrong = {name: [count_different(single[0][name], run[name]) for run in several] for name in single[0]}
    layer = max(wrong, key=lambda name: max(wrong[name]))
    return Nondeterminism(
        threads=threads,
        layer=layer,
        voxels=len(single[0][layer][0]),
        from_one_thread=tuple(wrong[layer]),
        from_run_before=tuple(count_different(a[layer], b[layer]) for a, b in pairwise(several)),
        one_thread_repeats=not any(count_different(single[0][name], single[1][name]) for name in single[0]),
    )


def count_different(
    one: tuple[npt.NDArray[Any], npt.NDArray[np.float32]],
    other: tuple[npt.NDArray[Any], npt.NDArray[np.float32]],
) -> int:
    """Count the voxels of `one` that `other` lacks or that have other features there.

    Args:
        one: indices (N, 1 + D) in lexicographic order, and features (N, C).
        other: the same of another run. Features differ if by more than `TOLERANCE` of the largest feature of `one`.
    """
    (places, features), (other_places, other_features) = one, other
    known = {tuple(place): row for row, place in enumerate(other_places.tolist())}
    rows = np.array([known.get(tuple(place), -1) for place in places.tolist()], dtype=np.int64)
    found = rows >= 0
    difference = np.abs(features[found] - other_features[rows[found]]).max(axis=1, initial=0)
    limit = TOLERANCE * float(np.abs(features).max(initial=0))
    return int((~found).sum() + (~(difference <= limit)).sum())


def _layers(
    python: Path, config: Path, checkpoint: Path, frame: Path, threads: int, runs: int
) -> list[Layers]:
    outputs: list[Layers] = []
    with (
        tempfile.TemporaryDirectory(prefix="mmdet3d-serve-bench-") as folder,
        ReferenceProcess(python, threads) as native,
    ):
        native.call("load", config=str(config), checkpoint=str(checkpoint), device="cpu")
        for run in range(runs):
            file = Path(folder, f"{run}.npz")
            names = native.call("layers", frame=str(frame), file=str(file))["layers"]
            with np.load(file, allow_pickle=False) as kept:
                outputs.append({name: (kept[f"{name}/places"], kept[f"{name}/features"]) for name in names})
    return outputs

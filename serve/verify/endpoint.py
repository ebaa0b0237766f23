"""Compare a server's predictions with a reference model's, frame by frame.

Both sides, `serve.verify.reference` and a server behind `serve.client`, receive the same file and score threshold. A
server that serves another model than the reference is an error, not a deviation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from serve.client import Client, frame_parts
from serve.compare.detections import Comparison, compare_answers, is_3d
from serve.compare.labels import LabelComparison, has_labels
from serve.compare.ties import VARIANTS, confirm_ties
from serve.compare.tolerances import Tolerances
from serve.errors import BackendBroken, BadRequest, ModelNotFound, SettingsError, UndecodableFrame
from serve.protocol.frame_spec import Modality
from serve.torchserve.management import read_tokens
from serve.verify.reference import FRAME_SUFFIXES, filter_by_score

__all__ = [
    "FRAME_MARKERS",
    "Expected",
    "FrameReport",
    "Reference",
    "find_frames",
    "read_token",
    "require_same_model",
    "verify",
]

# Mark a folder as a frame of several sweeps, and of several sensors.
_SWEEPS, _CALIBRATION = FRAME_MARKERS = ("sweeps.json", "calibration.json")


class Expected(Protocol):
    """What the answers of a model are recognized by."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, by label."""

    @property
    def box_type_3d(self) -> str | None:
        """``LiDAR``, ``Camera`` or ``Depth``; None for 2D boxes and for labels."""


class Reference(Expected, Protocol):
    """Interface of the reference side, which `serve.verify.reference.ReferenceModel` implements."""

    @property
    def modality(self) -> Modality:
        """Kind of frame, one of `serve.protocol.frame_spec.MODALITIES`."""

    @property
    def load_dim(self) -> int | None:
        """Floats per point; None without a point cloud."""

    def detect(self, frame: Path | Mapping[str, Path], variant: int = 0) -> Mapping[str, Any]:
        """Run one frame, given as a file or as files by part; returns all predictions without a threshold.

        A `variant` other than 0 is the model with weights changed by as little as rounding changes them.
        """


@dataclass(frozen=True)
class FrameReport:
    """Predictions of both sides for one frame, at or above the score threshold, and their comparison."""

    path: Path
    reference: Mapping[str, Any]
    served: Mapping[str, Any]
    comparison: Comparison | LabelComparison


def find_frames(path: str | Path, modality: Modality) -> list[Path]:
    """List the frames at a path: the file itself, or the folder's files that such a model reads, by name.

    A frame of several parts is a folder with one file per part, named after it, among them ``calibration.json`` or, of
    several sweeps, ``sweeps.json``; a folder of such folders holds several frames.

    Raises:
        UndecodableFrame: no such path, or no frame in the folder.
    """
    path = Path(path)
    if modality not in ("lidar", "depth", "image"):
        folders = sorted(
            {file.parent for file in [*path.glob(_CALIBRATION), *path.glob(f"*/{_CALIBRATION}")]}
        )
        if not folders:
            raise UndecodableFrame(
                f"{path} has no frame for a {modality} model: a folder with {_CALIBRATION} and one file per part"
            )
        return folders
    endings = FRAME_SUFFIXES["image" if modality == "image" else "points"]
    if path.is_file() or (path / _SWEEPS).is_file():
        return [path]
    if not path.is_dir():
        raise UndecodableFrame(f"file or folder {path} does not exist")
    frames = sorted(
        entry
        for entry in path.iterdir()
        if (entry.suffix.lower() in endings and entry.is_file()) or (entry / _SWEEPS).is_file()
    )
    if not frames:
        raise UndecodableFrame(f"{path} has no frame for a {modality} model ({', '.join(endings)})")
    return frames


def verify(
    frames: Iterable[Path],
    reference: Reference,
    client: Client,
    model: str,
    *,
    version: str | None = None,
    score_thr: float = 0.3,
    tolerances: Tolerances | None = None,
) -> Iterator[FrameReport]:
    """Run every frame on both sides, in order, and compare.

    Args:
        frames: files; see `find_frames`.
        reference: the reference model.
        client: connected to the server.
        model: name of the served model.
        version: version of the served model; the server's default if None.
        score_thr: lowest score of the compared detections.
        tolerances: limits of equality; the defaults of `Tolerances` if None.

    Yields:
        One `FrameReport` per frame, in order.

    Raises:
        ModelNotFound: the server has no such model, or it differs from the reference model.
        NotReady: the server cannot be reached.
        UndecodableFrame: one side cannot read a file.
        ServeError: any other error of the server.
    """
    for path in frames:
        parts = frame_parts(path)
        expected = filter_by_score(reference.detect(parts or path), score_thr)
        served = client.predict(path, model, version, score_thr=score_thr)
        require_same_model(reference, served, model)
        found = compare_answers(expected, served, tolerances, score_thr)
        variants = (
            filter_by_score(reference.detect(parts or path, variant), score_thr)
            for variant in range(1, VARIANTS + 1)
        )
        found = confirm_ties(found, expected, served, variants)
        yield FrameReport(path, expected, served, found)


def read_token(path: str | Path) -> str:
    """Read the inference token from a file: TorchServe's ``key_file.json``, or the bare token.

    Raises:
        BadRequest: the file cannot be read or holds no token.
    """
    try:
        text = Path(path).read_text(encoding="utf-8").strip()
        if text.startswith("{"):
            text = read_tokens(Path(path))["inference"]
    except (OSError, UnicodeDecodeError, SettingsError) as error:
        raise BadRequest(f"token file {path} cannot be read: {error}") from error
    if not text or not text.isascii() or any(character.isspace() for character in text):
        raise BadRequest(f"token file {path} holds no token")
    return text


def require_same_model(reference: Expected, served: Mapping[str, Any], model: str) -> None:
    """Check that an answer has the boxes and the classes of the reference.

    Args:
        reference: classes and type of boxes that are expected.
        served: an answer of the served model.
        model: its name.

    Raises:
        ModelNotFound: other boxes or other classes.
        BackendBroken: the answer holds no detections.
    """
    if not (is_3d(served) or "bboxes" in served or has_labels(served)):
        raise BackendBroken(f"'{model}' returned {', '.join(sorted(served)[:6])} instead of detections")
    kinds = ["3D" if three else "2D" for three in (reference.box_type_3d is not None, is_3d(served))]
    differences = []
    if kinds[0] != kinds[1] and not has_labels(served):
        differences.append(f"its boxes are {kinds[1]}, the config's {kinds[0]}")
    elif is_3d(served) and served.get("box_type_3d") != reference.box_type_3d:
        box_type = served.get("box_type_3d")
        differences.append(f"its boxes are of type {box_type}, the config's of type {reference.box_type_3d}")
    classes = served.get("classes")
    if classes is not None and tuple(classes) != reference.classes:
        expected = _shorten(reference.classes)
        differences.append(f"its classes are {_shorten(classes)}, the checkpoint's {expected}")
    labels = served.get("labels_3d", served.get("labels")) or ()
    for label, name in zip(labels, served.get("names") or (), strict=False):
        known = isinstance(label, int) and 0 <= label < len(reference.classes)
        if not differences and (not known or reference.classes[label] != name):
            expected = repr(reference.classes[label]) if known else "missing"
            differences.append(f"its label {label} is {name!r}, in the checkpoint {expected}")
    if differences:
        raise ModelNotFound(
            f"the server's '{model}' is not the model of this config and checkpoint: {'; '.join(differences)}"
        )


def _shorten(names: Sequence[Any]) -> str:
    more = f", ... ({len(names)})" if len(names) > 6 else ""
    return ", ".join(str(name) for name in names[:6]) + more

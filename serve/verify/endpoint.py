"""Does a server answer what the model itself detects? Frame by frame, native against served.

Puts together `serve.verify.reference` (the reference), `serve.client` (the server) and `serve.compare.detections`. Both sides
get the same file and the same score threshold. That another model is served than the one compared with is
told apart from a deviation of the right one.

Knows nothing about archives, TorchServe's management or how either side was started.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from serve.client import Client
from serve.compare.detections import Comparison, Tolerances, compare_answers, detection_count, is_3d
from serve.compare.labels import LabelComparison, has_labels
from serve.errors import BackendBroken, BadRequest, ModelNotFound, UndecodableFrame
from serve.protocol.frames import Modality
from serve.verify.reference import FRAME_SUFFIXES, filter_by_score
from serve.visualize.detections import draw_frame, encode_png

__all__ = ["FrameReport", "Reference", "draw_report", "find_frames", "read_token", "summary", "verify"]

_CONTENT_TYPES = {
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".png": "image/png",
    ".bmp": "image/bmp",
    ".webp": "image/webp",
}


class Reference(Protocol):
    """The side that is right: `serve.verify.reference.ReferenceModel`, or a stand-in."""

    @property
    def modality(self) -> Modality:
        """What a frame is, one of `serve.protocol.frames.MODALITIES`."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, by label."""

    @property
    def box_type_3d(self) -> str | None:
        """``LiDAR``, ``Camera`` or ``Depth``; None for 2D boxes and for labels."""

    @property
    def load_dim(self) -> int | None:
        """Floats per point; None without a cloud."""

    def detect(self, frame: Path | Mapping[str, Path]) -> Mapping[str, Any]:
        """The whole answer to one file, or to the files of a frame's parts by name."""


@dataclass(frozen=True)
class FrameReport:
    """One frame: what either side detected at or above the threshold, and how they compare."""

    path: Path
    native: Mapping[str, Any]
    served: Mapping[str, Any]
    comparison: Comparison | LabelComparison

    def text(self, max_rows: int = 20) -> str:
        """The frame's name and its table."""
        return f"{self.path}\n{self.comparison.table(max_rows)}"


def find_frames(path: str | Path, modality: Modality) -> list[Path]:
    """The frames meant by a path: the file itself, or a folder's files that such a model reads, by name.

    A frame of several parts is a folder with one file of each, called by the part, ``calibration.json`` among
    them; a folder of such folders holds several frames.

    Raises:
        UndecodableFrame: no such path, or no frame in the folder.
    """
    path = Path(path)
    if modality not in ("lidar", "depth", "image"):
        folders = sorted(
            {file.parent for file in [*path.glob("calibration.json"), *path.glob("*/calibration.json")]}
        )
        if not folders:
            raise UndecodableFrame(
                f"{path} is no folder with calibration.json and the other parts of a frame"
            )
        return folders
    endings = FRAME_SUFFIXES["image" if modality == "image" else "points"]
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UndecodableFrame(f"there is no file or folder {path}")
    frames = sorted(file for file in path.iterdir() if file.suffix.lower() in endings and file.is_file())
    if not frames:
        raise UndecodableFrame(f"{path} holds no frame for a {modality} model ({', '.join(endings)})")
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
    """Run every frame on both sides, one after the other, and compare.

    Args:
        frames: files; see `find_frames`.
        reference: the native model.
        client: connected to the server.
        model: the name the model is served under.
        version: the version served; the server's default when None.
        score_thr: detections of either side that score less are left out.
        tolerances: what counts as equal; the defaults of `Tolerances` when None.

    Yields:
        One `FrameReport` per frame, in order.

    Raises:
        ModelNotFound: nothing of that name is served, or it is another model than the reference.
        NotReady: the server cannot be reached.
        UndecodableFrame: a file cannot be read on one of the sides.
        ServeError: any other error the server answers with; the message names the file.
    """
    for path in frames:
        parts = _parts_of(path)
        native = filter_by_score(reference.detect(parts or path), score_thr)
        served = client.predict(
            {name: file.read_bytes() for name, file in parts.items()} if parts else path.read_bytes(),
            model,
            version,
            content_type=_CONTENT_TYPES.get(path.suffix.lower(), "application/octet-stream"),
            score_thr=score_thr,
        )
        _require_same_model(reference, served, model)
        yield FrameReport(path, native, served, compare_answers(native, served, tolerances, score_thr))


def _parts_of(path: Path) -> dict[str, Path]:
    """The files of a frame of several parts, by part; empty for a frame that is one file."""
    return {file.stem: file for file in sorted(path.iterdir()) if file.is_file()} if path.is_dir() else {}


def summary(reports: Sequence[FrameReport]) -> str:
    """The last line: how many frames match, and the largest deviations over all of them."""
    bad = [report.path.name for report in reports if not report.comparison.ok]
    labels = [report.comparison for report in reports if isinstance(report.comparison, LabelComparison)]
    if labels:
        share = min(comparison.share for comparison in labels)
        word = "MISMATCH" if bad else "match"
        return (
            f"{word}: {len(labels) - len(bad)} of {len(labels)} frames agree; least share of {labels[0].unit} with the "
            f"same label: {share:.4%}"
        )
    found = [report.comparison for report in reports if isinstance(report.comparison, Comparison)]
    unit = "m" if any(comparison.is_3d for comparison in found) else "px"
    largest = [f"box {max((c.largest_box for c in found), default=0.0):.1e} {unit}"]
    if unit == "m":
        largest.append(f"yaw {max((c.largest_yaw for c in found), default=0.0):.1e} rad")
    largest.append(f"score {max((c.largest_score for c in found), default=0.0):.1e}")
    ious = [c.smallest_mask_iou for c in found if c.smallest_mask_iou is not None]
    if ious:
        largest.append(f"mask IoU {min(ious):.4f}")
    pairs = sum(len(comparison.pairs) for comparison in found)
    lines = [
        f"{'MISMATCH' if bad else 'match'}: {len(found) - len(bad)} of {len(found)} frames agree, "
        f"{pairs} detections compared; largest deviation over all: {', '.join(largest)}"
    ]
    if bad:
        lines.append(f"frames that differ: {', '.join(bad[:10])}{', ...' if len(bad) > 10 else ''}")
    natives = [report.native for report in reports]
    blind = len(natives) > 1 and all(compare_answers(natives[0], native).ok for native in natives[1:])
    if blind and detection_count(natives[0]):
        lines.append("note: the model detects the same in every frame; such weights hide a wrong input")
    if not any(detection_count(side) for report in reports for side in (report.native, report.served)):
        lines.append("note: neither side detected anything; a lower --score-thr compares more")
    return "\n".join(lines)


def draw_report(report: FrameReport, folder: str | Path, load_dim: int | None = None) -> list[Path]:
    """Draw both sides of a frame as ``NAME.native.png`` and ``NAME.served.png`` into ``folder``.

    Returns:
        The files written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    parts = _parts_of(report.path)
    body = {name: file.read_bytes() for name, file in parts.items()} if parts else report.path.read_bytes()
    written = []
    for side, detections in (("native", report.native), ("served", report.served)):
        picture = draw_frame(body, detections, load_dim=load_dim or 4, title=f"{report.path.name}, {side}")
        written.append(folder / f"{report.path.name}.{side}.png")
        written[-1].write_bytes(encode_png(picture))
    return written


def read_token(path: str | Path) -> str:
    """The inference token in a file: TorchServe's ``key_file.json``, or the bare token.

    Raises:
        BadRequest: the file cannot be read or holds no token.
    """
    try:
        text = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise BadRequest(f"the token file {path} cannot be read: {error}") from error
    if text.startswith("{"):
        try:
            text = str(json.loads(text)["inference"]["key"])
        except (ValueError, KeyError, TypeError) as error:
            raise BadRequest(f"the token file {path} holds no inference key") from error
    if not text or not text.isascii() or any(character.isspace() for character in text):
        raise BadRequest(f"the token file {path} holds no token")
    return text


def _require_same_model(reference: Reference, served: Mapping[str, Any], model: str) -> None:
    """Refuse the answer of a model that is not the reference: other boxes or other classes."""
    if not (is_3d(served) or "bboxes" in served or has_labels(served)):
        raise BackendBroken(f"'{model}' answers with {', '.join(sorted(served)[:6])} and not with detections")
    kinds = ["3D" if three else "2D" for three in (reference.box_type_3d is not None, is_3d(served))]
    differences = []
    if kinds[0] != kinds[1] and not has_labels(served):
        differences.append(f"it answers {kinds[1]} boxes, the config's are {kinds[0]}")
    elif is_3d(served) and served.get("box_type_3d") != reference.box_type_3d:
        theirs = served.get("box_type_3d")
        differences.append(f"its boxes are of type {theirs}, the config's of type {reference.box_type_3d}")
    classes = served.get("classes")
    if classes is not None and tuple(classes) != reference.classes:
        ours = _listed(reference.classes)
        differences.append(f"its classes are {_listed(classes)}, the checkpoint's {ours}")
    labels = served.get("labels_3d", served.get("labels")) or ()
    for label, name in zip(labels, served.get("names") or (), strict=False):
        known = isinstance(label, int) and 0 <= label < len(reference.classes)
        if not differences and (not known or reference.classes[label] != name):
            meant = repr(reference.classes[label]) if known else "not there"
            differences.append(f"its label {label} is {name!r}, which in the checkpoint is {meant}")
    if differences:
        raise ModelNotFound(f"what is served as '{model}' is another model: {'; '.join(differences)}")


def _listed(names: Sequence[Any]) -> str:
    more = f", ... ({len(names)})" if len(names) > 6 else ""
    return ", ".join(str(name) for name in names[:6]) + more

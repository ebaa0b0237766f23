"""Probe one config end to end: random weights, archive with its proof, single frames, a batch, native inference.

Runs in a process of its own, which a model can crash. The model's images are made smaller first (`shrink`), so that a
sweep over hundreds of configs finishes on a small machine.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from serve.errors import ArchiveError, ServeError

__all__ = ["ProbeResult", "run", "shrink", "try_config"]

# Longer and shorter side of images inside the network, and the size of the image that is sent.
SHRUNK_PX = (320, 224)
IMAGE_PX = (320, 240)
# With a mask for each of the 1,203 classes of LVIS, 300 detections in an image take minutes and 10 GB.
MAX_MASKS = 100
# Import name → package to install.
PACKAGES = {
    "mmpretrain": "mmpretrain",
    "mmcls": "mmpretrain",
    "lap": "lap",
    "transformers": "transformers",
    "fairscale": "fairscale",
    "skimage": "scikit-image",
    "scikit-image": "scikit-image",
    "detectron2": "Detectron2",
    "MinkowskiEngine": "MinkowskiEngine",
    "Minkowski": "MinkowskiEngine",
    "torchsparse": "TorchSparse",
    "timm": "timm",
    "nltk": "nltk",
    "instaboostfast": "instaboostfast",
    "albumentations": "albumentations",
    "torchvision": "torchvision",
    "dsdl": "dsdl",
}


@dataclass(frozen=True)
class ProbeResult:
    """Result of probing one config.

    Attributes:
        config: name of the config, without ``.py``.
        status: ``works``, ``needs package``, ``not a model``, ``not a per-frame model``, ``differs``,
            ``broken upstream`` or ``fails``.
        reason: explanation of the status, or notes on a working model.
        modality: kind of frame, if known.
        answers: number of detections, segments or labelled points of the golden frame.
        deviation: largest deviation from native inference, formatted.
        seconds: duration of the probe.
        packages: missing packages.
        served: whether the deviation is that of a TorchServe's answer.
    """

    config: str
    status: str
    reason: str = ""
    modality: str = ""
    answers: int | None = None
    deviation: str = ""
    seconds: float = 0.0
    packages: tuple[str, ...] = field(default=())
    served: bool = False


def shrink(config: Any, origin: Path) -> Any:
    """Limit the image size of a config's test pipeline and its number of masks, in place.

    Also removes weights of teachers, which only training uses, and those that a timm backbone would download, and makes
    a teacher's config path absolute, since it is relative to the root of upstream's repository.

    Args:
        config: an mmengine ``Config``.
        origin: path of the file it was read from.
    """
    dataset = (config.get("test_dataloader") or {}).get("dataset")
    while isinstance(dataset, Mapping) and "pipeline" not in dataset and "dataset" in dataset:
        dataset = dataset["dataset"]
    for step in _steps((dataset or {}).get("pipeline") or ()):
        if step.get("keep_ratio") is False and step.get("type", "").endswith("Resize"):
            continue  # the network has a fixed input size, as SSD
        for key in ("scale", "size", "img_scale"):
            value = step.get(key)
            if isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(n, int) for n in value):
                step[key] = _smaller(value)
    model = config.get("model") or {}
    if isinstance(model.get("teacher_config"), str):
        model["teacher_config"] = str(origin.parents[2] / model["teacher_config"])
    if "teacher_ckpt" in model:
        model["teacher_ckpt"] = None
    region_head, test = model.get("roi_head") or {}, (model.get("test_cfg") or {}).get("rcnn") or {}
    # QueryInst has as many detections as proposals.
    limited = "mask_head" in region_head and region_head.get("type") != "SparseRoIHead"
    if limited and test.get("max_per_img", 0) > MAX_MASKS:
        test["max_per_img"] = MAX_MASKS
    if (model.get("backbone") or {}).get("pretrained") is True:
        model["backbone"]["pretrained"] = False
    return config


def _steps(pipeline: Any) -> Iterator[Any]:
    for step in pipeline:
        yield step
        yield from _steps(step.get("transforms") or ())


def _smaller(size: Any) -> tuple[int, int]:
    longer, shorter = SHRUNK_PX
    if size[0] == size[1]:
        return (min(size[0], shorter),) * 2
    ratio = min(1.0, longer / max(size), shorter / min(size))
    one, two = (max(32, round(n * ratio / 32) * 32) if ratio < 1 else n for n in size)
    return one, two


def try_config(path: Path, *, served: bool = False) -> ProbeResult:
    """Probe one config; failures of the model become a status, not an exception.

    Args:
        path: of the config.
        served: compare the answer of a TorchServe with upstream's, in place of one computed here.
    """
    started = time.perf_counter()
    found: dict[str, Any] = {}
    try:
        with tempfile.TemporaryDirectory(prefix="mmdet3d-serve-coverage-") as folder:
            result = _try(path, Path(folder), found, served=served)
    except Exception as error:
        result = _explain(path, error)
        traceback.print_exc()
    return replace(
        result,
        modality=result.modality or found.get("modality", ""),
        seconds=round(time.perf_counter() - started, 1),
    )


def _try(path: Path, folder: Path, properties: dict[str, Any], *, served: bool) -> ProbeResult:
    import torch
    from mmengine.config import Config

    from serve import archive, convert
    from serve.compare.detections import compare_answers
    from serve.compare.ties import VARIANTS, confirm_ties
    from serve.convert import golden
    from serve.convert.random_weights import write_random_checkpoint
    from serve.protocol.options import FrameOptions
    from serve.runtime import load_detector
    from serve.runtime.pipeline import frame_spec
    from serve.runtime.rounding import variants
    from serve.settings import Limits
    from serve.verify.reference_loading import load_reference
    from tools.zoo.served import verify_served

    # 1. Shrink the config.
    small = folder / path.name
    try:
        full = Config.fromfile(str(path), import_custom_modules=False)
    except FileNotFoundError as error:
        missing = Path(str(error.filename)).name
        return ProbeResult(
            path.stem, "broken upstream", f"the config is based on {missing}, which is not there"
        )
    if "model" not in full:
        return ProbeResult(path.stem, "not a model", "the config describes no model")
    if not full.get("test_dataloader"):
        return ProbeResult(path.stem, "broken upstream", "the config describes no test pipeline")
    shrink(full, path).dump(str(small))
    resolved = convert.resolve_config(small).config
    spec = frame_spec(resolved)
    properties["modality"] = spec.modality
    # 2. Write weights, and an archive that proves itself.
    classes = tuple(convert.configured_classes(resolved)) or _number_classes(resolved["model"])
    checkpoint = folder / "random.pth"
    frame = None
    if spec.modality == "image":
        import cv2

        frame = folder / "image.png"
        cv2.imwrite(str(frame), golden.golden_image(*IMAGE_PX))
    write_random_checkpoint(resolved, classes, checkpoint, frame=frame)
    converted = convert.convert(convert.Conversion(small, checkpoint, folder, "tried", golden_frame=frame))
    opened = archive.extract(converted.path, folder / "opened")
    detector = load_detector(opened, torch.device("cpu"), trust_code=True)
    # 3. Run two different frames singly and as a batch.
    first = detector.decode(opened.golden_frame(), FrameOptions(), Limits())
    second = _modify(first)
    single = [_run_one(detector, one) for one in (first, second)]
    batched = [_get_result(outcome) for outcome in detector.run([first, second])]
    for each, one, two in zip((first, second), single, batched, strict=True):
        answers = variants(detector.network, partial(_run_one, detector, each))
        found = confirm_ties(compare_answers(one, two, sides=("single", "batched")), one, two, answers)
        if not found.ok:
            return ProbeResult(path.stem, "differs", f"a batch from single frames: {found.verdict()}")
    # 4. Compare with upstream's own functions.
    reference = load_reference(small, checkpoint, "cpu")
    if served:
        del detector
        found = verify_served(converted.path, opened, reference, folder / "frame")
    else:
        entries = opened.metadata.golden_frame
        files = (
            opened.root / entries
            if isinstance(entries, str)
            else {name: opened.root / entry for name, entry in entries.items()}
        )
        native = reference.detect(files)
        found = confirm_ties(
            compare_answers(native, single[0]),
            native,
            single[0],
            (reference.detect(files, variant) for variant in range(1, VARIANTS + 1)),
        )
    if not found.ok:
        problems = "; ".join((found.verdict(), *found.problems))
        return ProbeResult(
            path.stem,
            "differs",
            f"from native inference: {problems}",
            answers=converted.golden_detections,
            served=served,
        )
    return ProbeResult(
        path.stem,
        "works",
        "; ".join(converted.notes),
        answers=converted.golden_detections,
        deviation=_format_deviation(found),
        served=served,
    )


def _format_deviation(found: Any) -> str:
    """Format the largest deviations of a comparison, and the number of ties."""
    if hasattr(found, "share"):
        tied = f", {found.tied} tied" if found.tied else ""
        return f"{found.count - found.agreeing - found.tied} of {found.count} {found.unit}{tied}"
    unit = "m" if found.is_3d else "px"
    parts = [f"{found.largest_box:.0e} {unit}", f"score {found.largest_score:.0e}"]
    if found.smallest_mask_iou is not None:
        parts.append(f"mask IoU {found.smallest_mask_iou:.3f}")
    return ", ".join([*parts, *([f"{found.ties} tied"] if found.ties else [])])


def _run_one(detector: Any, frame: Any) -> dict[str, Any]:
    return _get_result(detector.run([frame])[0])


def _get_result(outcome: Any) -> dict[str, Any]:
    if isinstance(outcome, ServeError):
        raise outcome
    return dict(outcome)


def _modify(frame: Any) -> Any:
    """Make another frame of the same kind: half of the points, mirrored images."""
    if isinstance(frame.data, dict):
        changed = {
            name: value if name == "calibration" else _change(value) for name, value in frame.data.items()
        }
        return replace(frame, data=changed)
    return replace(frame, data=_change(frame.data))


def _change(array: Any) -> Any:
    return np.ascontiguousarray(array[::2] if array.dtype == np.float32 else array[:, ::-1])


def _number_classes(model: Any) -> tuple[str, ...]:
    """Generate class names for a data set without any: as many as the first head has classes."""
    counts = re.findall(r"'num_classes': (\d+)", str(model))
    return tuple(f"class {i}" for i in range(int(counts[0]) if counts else 1))


def _explain(path: Path, error: Exception) -> ProbeResult:
    """Classify an exception."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    text = " ".join(f"{type(one).__name__}: {one}" for one in chain)
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    if isinstance(error, ArchiveError) and "frame by frame" in str(error):
        return ProbeResult(path.stem, "not a per-frame model", str(error).rpartition(": ")[2])
    if isinstance(error, ArchiveError) and "LoadProposals" in text:
        reason = "it needs the proposals of another model beside the image"
        return ProbeResult(path.stem, "not a per-frame model", reason)
    if isinstance(error, ArchiveError) and (
        "describes no model" in text or "test_dataloader.dataset.pipeline" in text
    ):
        return ProbeResult(path.stem, "not a model", str(error)[:300])
    wanted = {package for name, package in PACKAGES.items() if re.search(rf"\b{name}\b", text, re.IGNORECASE)}
    if wanted and re.search(r"install|No module named|import|registry", text, re.IGNORECASE):
        packages = tuple(sorted(wanted))
        return ProbeResult(path.stem, "needs package", " ".join(packages), packages=packages)
    if re.search(r"from_pretrained|huggingface|hub|couldn't connect|offline", text, re.IGNORECASE):
        return ProbeResult(
            path.stem,
            "needs package",
            "a text model and its tokenizer from a hub",
            packages=("a text model",),
        )
    return ProbeResult(path.stem, "fails", reason)


def run(config: Path, out: Path, log: Path, served: bool) -> None:
    """Probe a config in a process of its own: write the result to `out` and all output to `log`."""
    os.setsid()  # the sweep handles Ctrl-C and kills its probes
    with log.open("wb") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    out.write_text(json.dumps(asdict(try_config(config, served=served))))

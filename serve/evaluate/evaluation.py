"""Run a data set through a served model and through the native one, and compute the same metrics of both.

The first answer is checked before the native model is loaded, so that a server that is down or serves another model is
an error within seconds. The native side is upstream's ``test_step`` on the data set's own pipeline, frame by frame, as
``tools/test.py`` runs it with a batch size of one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from serve.errors import DataSetError, InferenceFailed, ServeError
from serve.evaluate.data_set import DataSet, upstream_session
from serve.evaluate.endpoints import Endpoint
from serve.evaluate.figures import Figure
from serve.evaluate.frames import DataFrame, read_frames
from serve.evaluate.metrics import Metrics, open_metrics
from serve.evaluate.samples import with_answer
from serve.verify.endpoint import require_same_model
from serve.verify.reference import ReferenceModel

__all__ = ["Evaluation", "Row", "evaluate"]


@dataclass(frozen=True)
class Row:
    """A figure of both sides; points of average precision, None if nothing was to find or a side was not run."""

    label: str | None
    kind: str
    native: float | None
    served: float | None

    @property
    def difference(self) -> float | None:
        """Served minus native, without what floating-point numbers add to upstream's rounded ones."""
        return (
            None if self.native is None or self.served is None else round(self.served - self.native, 6) + 0.0
        )


@dataclass(frozen=True)
class Evaluation:
    """Figures of a served model on a data set, beside the native model's.

    Attributes:
        rows: all figures, in upstream's order.
        frames: number of frames.
        detections: number of detections, native (None if it was not run) and served.
    """

    rows: tuple[Row, ...]
    frames: int
    detections: tuple[int | None, int]

    @property
    def largest_difference(self) -> float | None:
        """Largest absolute difference of any figure; None without a native side."""
        return max((abs(row.difference) for row in self.rows if row.difference is not None), default=None)


@dataclass
class _Side:
    """Predictions of one side on their way to the metrics."""

    metrics: Metrics
    detections: int = 0
    samples: list[Any] = field(default_factory=list)

    def add(self, sample: Any, *, keep: bool = False) -> None:
        found = sample.get("pred_instances_3d") or sample.get("pred_instances")
        self.detections += len(found)
        if keep:
            self.samples.append(sample.to_dict())
        self.metrics.add(sample)


def evaluate(
    data: DataSet,
    endpoint: Endpoint,
    load_native: Callable[[], ReferenceModel] | None = None,
    *,
    predictions: Path | None = None,
    progress: Callable[[Iterable[DataFrame]], Iterable[DataFrame]] = iter,
) -> Evaluation:
    """Evaluate a served model on a data set.

    Args:
        data: the data set.
        endpoint: the served model.
        load_native: loads the native model; None computes the figures of the served one only.
        predictions: file to write the served predictions to, as ``test.py --out`` writes the native ones.
        progress: wraps the frames, such as `tqdm.tqdm`.

    Raises:
        DataSetError: a frame cannot be read, the classes differ, or a metric cannot be computed.
        ModelNotFound: the server serves another model.
        NotReady: the server cannot be reached.
        InferenceFailed: the native model failed on a frame.
        ServeError: any other error of the server.
    """
    with upstream_session(data.settings.scope), open_metrics(data) as configs, endpoint:
        served = _Side(Metrics(configs, data))
        native = None if load_native is None else _Side(Metrics(configs, data))
        model: ReferenceModel | None = None
        for frame, answer in _answered(progress(read_frames(data)), endpoint):
            _check_answer(data, answer, endpoint.name)
            if load_native is not None and model is None:
                model = load_native()
            if native is not None and model is not None:
                require_same_model(model, answer, endpoint.name)
                native.add(_native(model, frame))
            sample = with_answer(
                frame.sample,
                answer,
                len(data.classes),
                with_masks=served.metrics.with_masks,
                with_pixels=served.metrics.with_pixels,
            )
            served.add(sample, keep=predictions is not None)
        figures = served.metrics.compute()
        beside = None if native is None else native.metrics.compute()
        if predictions is not None:
            _dump(served.samples, predictions)
    return Evaluation(
        tuple(_rows(figures, beside)),
        data.size,
        (None if native is None else native.detections, served.detections),
    )


def _answered(
    frames: Iterable[DataFrame], endpoint: Endpoint
) -> Iterator[tuple[DataFrame, Mapping[str, Any]]]:
    """Yield frames with their answers, in order, while the endpoint works on the next ones."""
    pending: deque[tuple[DataFrame, Any]] = deque()
    for frame in frames:
        pending.append((frame, endpoint.submit(frame)))
        if len(pending) >= endpoint.concurrency:
            yield _finished(*pending.popleft())
    while pending:
        yield _finished(*pending.popleft())


def _finished(frame: DataFrame, future: Any) -> tuple[DataFrame, Mapping[str, Any]]:
    try:
        return frame, future.result()
    except ServeError as error:
        raise type(error)(f"{error} (frame {frame.name})") from error


def _check_answer(data: DataSet, answer: Mapping[str, Any], model: str) -> None:
    """Compare boxes and class names of an answer with those of the data set, whose labels they must share."""
    if "bboxes_3d" not in answer and "bboxes" not in answer:
        raise DataSetError(
            f"'{model}' answers without boxes; only boxes and masks of instances are evaluated"
        )
    if ("bboxes_3d" in answer) != (data.box_type_3d is not None):
        found, wanted = ("3D", "2D") if "bboxes_3d" in answer else ("2D", "3D")
        raise DataSetError(f"the boxes of '{model}' are {found}, those of the data set {wanted}")
    classes = tuple(answer.get("classes") or data.classes)
    if classes != data.classes:
        raise DataSetError(
            f"the classes of '{model}' are {_shorten(classes)}, those of the data set {_shorten(data.classes)}; labels "
            "would be mixed up: name the classes in the order of the model (metainfo=dict(classes=…))"
        )


def _shorten(names: tuple[str, ...]) -> str:
    return ", ".join(names[:6]) + (f", … ({len(names)})" if len(names) > 6 else "")


def _native(model: ReferenceModel, frame: DataFrame) -> Any:
    import torch
    from mmengine.dataset import pseudo_collate

    batch = pseudo_collate([{"inputs": frame.inputs, "data_samples": frame.sample.clone()}])
    try:
        with torch.no_grad():
            return model.module.test_step(batch)[0]
    except Exception as error:
        raise InferenceFailed(f"upstream failed on {frame.name}: {type(error).__name__}: {error}") from error


def _rows(served: list[Figure], native: list[Figure] | None) -> Iterator[Row]:
    beside = {(figure.label, figure.kind): figure.points for figure in native or ()}
    for figure in served:
        yield Row(figure.label, figure.kind, beside.get((figure.label, figure.kind)), figure.points)


def _dump(samples: list[Any], path: Path) -> None:
    """Write predictions by one rename."""
    from mmengine.fileio import dump

    part = path.with_name(f".{path.stem}.part.pkl")
    try:
        dump(samples, str(part))
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)

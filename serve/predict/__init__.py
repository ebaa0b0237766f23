"""Predictions without a server of one's own, or through one: images, clouds, videos, cameras, buckets.

    from serve.predict import load_model, predict

    with load_model("second.mar", device="cuda:0") as model:
        for prediction in predict("clouds/", model, score_thr=0.3):
            print(prediction.frame.name, prediction.answer or prediction.error)

`connect(url, name)` takes a served model in place of `load_model`; `AsyncPredictor` serves the tasks of an event loop.
``mmdet3d-serve predict`` is `serve.predict.run`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from serve.predict.asynchronous import AsyncPredictor
from serve.predict.frames import Frame, FrameInput, Prediction, as_body
from serve.predict.loading import load_model
from serve.predict.models import LocalModel, Model, RemoteModel, connect, open_archive
from serve.predict.pipeline import predict_frames
from serve.predict.sources import Source, open_source
from serve.protocol.options import FrameOptions

__all__ = [
    "AsyncPredictor",
    "Frame",
    "FrameInput",
    "FrameOptions",
    "LocalModel",
    "Model",
    "Prediction",
    "RemoteModel",
    "Source",
    "as_body",
    "connect",
    "load_model",
    "open_archive",
    "open_source",
    "predict",
    "predict_frames",
]


def predict(
    source: str | Path | Source,
    model: Model,
    *,
    score_thr: float = 0.0,
    max_detections: int | None = None,
    batch_size: int = 1,
) -> Iterator[Prediction]:
    """Predict the frames of a source in order, reading ahead; memory does not grow with their number.

    Args:
        source: see `open_source`: a file, folder, pattern, video, camera, stream or URI.
        model: from `load_model` or `connect`.
        score_thr: minimum score of a detection.
        max_detections: maximum number of detections per frame, best first; None for all.
        batch_size: frames per batch.

    Yields:
        One prediction per frame, with its answer or its error.

    Raises:
        ServeError: the source or the model as a whole failed.
    """
    frames = source if isinstance(source, Source) else open_source(source, model.modality)
    options = FrameOptions(score_thr=score_thr, max_detections=max_detections)
    yield from predict_frames(frames, model, options, batch_size=batch_size, ahead=0 if frames.live else 4)

"""Label an image with the SDKs of Label Studio and CVAT, and print a transcript, as those of docs/labelling.md.

    python -m tools.labelling_calls label-studio --backend http://127.0.0.1:9090 --image street.png --classes Car,Van
    python -m tools.labelling_calls cvat --address 127.0.0.1:8000 --model faster-rcnn --image street.png

The first one calls a running ``mmdet3d-serve label-studio`` as Label Studio does; its SDK writes the label config and
checks the prediction. The second one gives the image to CVAT's own driver. Neither server takes part: CVAT's task is
one in memory, which prints what the driver uploads. Needs the package label-studio-sdk or cvat-sdk.
"""

from __future__ import annotations

import argparse
import base64
import logging
import mimetypes
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import httpx
import PIL.Image

_TASK_ID = 137


def main(argv: Sequence[str] | None = None) -> None:
    """Print a transcript."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="SDK")
    label_studio = commands.add_parser("label-studio", help="label-studio-sdk")
    label_studio.add_argument("--backend", default="http://127.0.0.1:9090", metavar="URL")
    label_studio.add_argument("--classes", required=True, metavar="NAME,…", help="labels of the project")
    label_studio.set_defaults(run=label_in_label_studio)
    cvat = commands.add_parser("cvat", help="cvat-sdk")
    cvat.add_argument("--address", default="127.0.0.1:8000", metavar="HOST:PORT", help="of the gateway")
    cvat.add_argument("--model", required=True, metavar="NAME")
    cvat.add_argument("--shapes", default="rectangle", choices=("rectangle", "mask", "polygon"))
    cvat.set_defaults(run=label_in_cvat)
    for command in (label_studio, cvat):
        command.add_argument("--image", type=Path, required=True, metavar="FILE")
    args = parser.parse_args(argv)
    args.run(args)


def label_in_label_studio(args: argparse.Namespace) -> None:
    """Call the backend as Label Studio does, and let its SDK read the prediction."""
    from label_studio_sdk.converter.brush import decode_rle
    from label_studio_sdk.label_interface import LabelInterface

    labels = [("Label", {"value": name}, ()) for name in args.classes.split(",")]
    config = LabelInterface.create(
        {"image": "Image", "box": ("RectangleLabels", {}, labels), "brush": ("BrushLabels", {}, labels)}
    )
    interface = LabelInterface(config)
    _show("LabelInterface.create(…)", config.strip())
    kind = mimetypes.guess_type(args.image.name)[0] or "image/png"
    image = f"data:{kind};base64,{base64.b64encode(args.image.read_bytes()).decode()}"
    with httpx.Client(base_url=args.backend, trust_env=False, timeout=60) as client:
        _show("GET /health", client.get("/health").text)
        _show("POST /setup", client.post("/setup", json={"project": "1.1", "schema": config}).text)
        tasks = [{"id": 1, "data": {"image": image}}]
        answer = client.post("/predict", json={"tasks": tasks, "project": "1.1", "label_config": config})
        _show("POST /predict", answer.status_code if answer.is_success else answer.text)
        answer.raise_for_status()
    (prediction,) = answer.json()["results"]
    if "error" in prediction:
        raise SystemExit(f"error: the image was not predicted: {prediction['error']['message']}")
    for region in prediction["result"]:
        value = region["value"]
        head = f"  {region['type']} {value[region['type']]} {region['score']:.3f}"
        if "rle" in value:
            shape = (region["original_height"], region["original_width"], 4)
            pixels = int((decode_rle(value["rle"]).reshape(shape)[..., 3] > 0).sum())
            print(f"{head} decode_rle: {pixels} of {shape[0] * shape[1]} pixels")
        else:
            sides = {name: round(value[name], 2) for name in ("x", "y", "width", "height")}
            print(f"{head} {sides}")
    errors = interface.validate_prediction(prediction, return_errors=True)
    _show("LabelInterface(config).validate_prediction(…, return_errors=True)", errors)


class _Task:
    """A task of one image in memory, in place of CVAT's server: what its driver reads, and prints what it uploads."""

    def __init__(self, image: Path, labels: Sequence[Any]) -> None:
        from cvat_sdk import models

        self.logger = logging.getLogger("cvat")
        self.tasks = SimpleNamespace(api=self)
        # CVAT's ids are other ones than the function's.
        self.labels = [
            models.Label(id=_TASK_ID + i, name=label.name, type=label.type, attributes=[], sublabels=[])
            for i, label in enumerate(labels)
        ]
        media = SimpleNamespace(load_image=lambda: PIL.Image.open(image))
        self.samples = [SimpleNamespace(frame_index=0, frame_name=image.name, media=media)]

    def partial_update_annotations(
        self, action: str, task_id: int, *, patched_labeled_data_request: Any
    ) -> None:
        """Print the shapes that the driver sends to CVAT's server."""
        _show("partial_update_annotations", f"{action}, task {task_id}")
        names = {label.id: label.name for label in self.labels}
        for shape in patched_labeled_data_request.shapes:
            points = [round(value, 1) for value in shape.points[:6]]
            more = f" and {len(shape.points) - 6} more" if len(shape.points) > 6 else ""
            label = f"label_id={shape.label_id} ({names[shape.label_id]})"
            print(f"  {shape.type} {label} frame={shape.frame} source={shape.source} {points}{more}")


def label_in_cvat(args: argparse.Namespace) -> None:
    """Let CVAT's driver annotate the image with `serve.labelling.cvat`."""
    import cvat_sdk.auto_annotation as cvataa
    from cvat_sdk.auto_annotation import driver

    from serve.labelling.cvat import create

    function = create(args.address, args.model, shapes=args.shapes)
    try:
        _show(f"create({args.model!r}, shapes={args.shapes!r})", "")
        for label in function.spec.labels:
            print(f"  label {label.id} {label.name} {label.type}")
        task: Any = _Task(args.image, function.spec.labels)
        with mock.patch.object(driver, "TaskDataset", lambda client, task_id, load_annotations: client):
            print(f">>> cvat_sdk.auto_annotation.annotate_task(client, {_TASK_ID}, function)")
            cvataa.annotate_task(task, _TASK_ID, function)
    finally:
        function.close()


def _show(call: str, found: object) -> None:
    print(f">>> {call}")
    if found != "":
        print(found)


if __name__ == "__main__":
    main()

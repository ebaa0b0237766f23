"""Requests as Label Studio sends them."""

from __future__ import annotations

import base64
from typing import Any

CONFIG = """
<View>
  <Image name="picture" value="$image"/>
  <RectangleLabels name="box" toName="picture"><Label value="Car"/><Label value="Person" predicted_values="Pedestrian"/></RectangleLabels>
  <BrushLabels name="brush" toName="picture"><Label value="Car"/></BrushLabels>
  <PolygonLabels name="outline" toName="picture"><Label value="Car"/><Label value="Pedestrian"/></PolygonLabels>
</View>
"""  # noqa: E501


def asked(*images: object, config: str = CONFIG) -> dict[str, Any]:
    """The request of Label Studio's `make_predictions`."""
    tasks = [{"id": i, "data": {"image": image}} for i, image in enumerate(images)]
    params = {"login": "", "password": "", "context": None}
    return {"tasks": tasks, "model_version": "", "project": "1.2", "label_config": config, "params": params}


def inline(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def of_kind(prediction: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [region for region in prediction["result"] if region["type"] == kind]

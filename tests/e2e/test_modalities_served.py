"""A model of several parts over a real TorchServe: form fields and JSON arrive as they were sent."""

from __future__ import annotations

import base64
import json

import httpx
import pytest

from serve.client import Client
from serve.compare.detections import compare_answers
from serve.errors import ClientError
from serve.torchserve import ServedModel, TorchServe, TorchServeOptions
from serve.verify.report import comparison_table
from tests.conftest import pick_free_ports
from tests.e2e.small_models import make

pytestmark = [pytest.mark.torchserve, pytest.mark.slow, pytest.mark.timeout(600)]


def test_parts_reach_the_model_through_torchserve(tmp_path):
    from serve.verify.reference_loading import load_reference

    model = make("mono3d", tmp_path)
    parts = model.opened.golden_frame()
    ports = dict(zip(("inference_port", "management_port", "metrics_port"), pick_free_ports(3), strict=True))
    options = TorchServeOptions(model_store=tmp_path, models=[ServedModel("mono3d.mar")], **ports)
    native = load_reference(model.config, model.checkpoint, "cpu").detect(model.files())
    with TorchServe(options), Client(f"127.0.0.1:{ports['inference_port']}") as client:
        served = client.predict(parts, "mono3d")
        found = compare_answers(native, served)
        assert found.ok and served["names"], comparison_table(found)
        assert client.predict(parts, "mono3d", max_detections=1)["names"] == served["names"][:1]
        with pytest.raises(ClientError, match="image, calibration"):
            client.predict({"image": parts["image"]}, "mono3d")
        with pytest.raises(ClientError, match="image, calibration"):
            client.predict(parts["image"], "mono3d")
        # TorchServe reads parts that say they are JSON or text by itself.
        url = f"http://127.0.0.1:{ports['inference_port']}/predictions/mono3d"
        image = ("image.png", parts["image"], "image/png")
        document = {
            "image": {"b64": base64.b64encode(parts["image"]).decode()},
            "calibration": json.loads(parts["calibration"]),
        }
        answers = [
            httpx.post(
                url, files={"image": image, "calibration": ("c.json", parts["calibration"], kind)}, timeout=60
            )
            for kind in ("application/json", "text/plain", "application/octet-stream")
        ]
        answers.append(
            httpx.post(
                url, files={"image": image}, data={"calibration": parts["calibration"].decode()}, timeout=60
            )
        )
        answers.append(httpx.post(url, json=document, timeout=60))
        for answer in answers:
            assert answer.status_code == 200, answer.text
            assert answer.json() == served

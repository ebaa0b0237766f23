"""The command behind the transcripts of docs/labelling.md, with the real SDKs."""

from __future__ import annotations

import pytest

from serve.labelling.options import LabelStudioOptions
from serve.labelling.server import create_backend
from tests.gateway.running import Listening
from tools import labelling_calls


@pytest.fixture
def image(png, tmp_path):
    path = tmp_path / "street.png"
    path.write_bytes(png)
    return path


def test_label_studios_sdk_accepts_what_the_backend_predicts(served, background, image, capsys):
    pytest.importorskip("label_studio_sdk.converter.brush", reason="needs label-studio-sdk")
    options = LabelStudioOptions(gateway_url=served.url, model="images")
    listening = Listening(background, create_backend(options))
    try:
        labelling_calls.main(
            ["label-studio", "--backend", listening.url, "--image", str(image), "--classes", "Car,Pedestrian"]
        )
    finally:
        listening.close()
    printed = capsys.readouterr().out
    assert printed.count("rectanglelabels [") == printed.count("brushlabels [") == 2
    assert printed.endswith("return_errors=True)\n[]\n")


@pytest.mark.parametrize("shapes", ["rectangle", "mask"])
def test_cvats_driver_uploads_what_the_function_finds(served, image, capsys, shapes):
    pytest.importorskip("cvat_sdk.auto_annotation", reason="needs cvat-sdk")
    labelling_calls.main(
        ["cvat", "--address", served.url, "--model", "images", "--image", str(image), "--shapes", shapes]
    )
    sent = [line for line in capsys.readouterr().out.splitlines() if "source=auto" in line]
    assert [line.split()[:3] for line in sent] == [
        [shapes, "label_id=137", "(Car)"],
        [shapes, "label_id=138", "(Pedestrian)"],
    ]

"""The ML backend, called as Label Studio calls it."""

from __future__ import annotations

import io
import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest

from serve.errors import SettingsError
from serve.labelling.masks import brush_rle, cvat_mask
from serve.labelling.options import LabelStudioOptions
from serve.labelling.server import create_backend
from tests.gateway.running import Listening, eventually
from tests.labelling.calls import CONFIG, asked, inline, of_kind
from tests.labelling.conftest import HEIGHT, WIDTH, masks


def test_calls_of_label_studio_are_answered(start_backend):
    client = start_backend()
    assert client.get("/health").json()["status"] == client.get("/").json()["status"] == "UP"
    setup = {"project": "1.2", "schema": CONFIG, "hostname": "http://evil", "access_token": "t"}
    assert client.post("/setup", json=setup).json() == {"model_version": "images"}
    assert client.post("/validate", json={"config": CONFIG}).json() == {
        "controls": ["box", "brush", "outline"]
    }
    assert client.get("/versions").json() == {"versions": ["images"]}
    assert client.post("/train", json={}).status_code == client.post("/webhook", json={}).status_code == 201


def test_prediction_has_boxes_masks_and_polygons(start_backend, png):
    answer = start_backend().post("/predict", json=asked(inline(png))).json()
    (prediction,) = answer["results"]
    first, second = of_kind(prediction, "rectanglelabels")
    assert first["value"] == {
        "x": 10.0, "y": 20.0, "width": 40.0, "height": 40.0, "rotation": 0, "rectanglelabels": ["Car"],
    }  # fmt: skip
    assert (first["original_width"], first["original_height"], first["score"]) == (
        WIDTH,
        HEIGHT,
        pytest.approx(0.9),
    )
    assert second["value"]["rectanglelabels"] == ["Person"]  # by predicted_values
    assert second["value"]["x"] + second["value"]["width"] == 100  # clipped
    (brush,) = of_kind(prediction, "brushlabels")  # the config has no brush for the other class
    assert brush["value"]["rle"] == brush_rle(masks()[0])
    outlines = of_kind(prediction, "polygonlabels")
    assert [each["value"]["polygonlabels"] for each in outlines] == [["Car"], ["Pedestrian"]]
    assert prediction["model_version"] == answer["model_version"] == "images"


def test_prediction_is_valid_for_label_studios_own_sdk(start_backend, png):
    interface = pytest.importorskip("label_studio_sdk.label_interface", reason="needs label-studio-sdk")
    brush = pytest.importorskip("label_studio_sdk.converter.brush", reason="needs label-studio-sdk")
    (prediction,) = start_backend().post("/predict", json=asked(inline(png))).json()["results"]
    checked = interface.LabelInterface(CONFIG)
    assert checked.validate_prediction(prediction, return_errors=True) == []
    (region,) = of_kind(prediction, "brushlabels")
    decoded = brush.decode_rle(region["value"]["rle"]).reshape(HEIGHT, WIDTH, 4)
    assert (decoded[..., 3] == 255 * masks()[0]).all()


@pytest.mark.parametrize("mask", [np.zeros((3, 5), bool), np.ones((300, 400), bool), masks()[0], masks()[1]])
def test_brush_is_what_label_studios_own_sdk_decodes(mask):
    brush = pytest.importorskip("label_studio_sdk.converter.brush", reason="needs label-studio-sdk")
    decoded = brush.decode_rle(brush_rle(mask)).reshape(*mask.shape, 4)
    assert (decoded[..., 3] == 255 * mask).all()


def test_polygon_encloses_its_mask(start_backend, png):
    import cv2

    (prediction,) = start_backend().post("/predict", json=asked(inline(png))).json()["results"]
    region = of_kind(prediction, "polygonlabels")[0]
    pixels = np.array(region["value"]["points"]) * [WIDTH / 100, HEIGHT / 100] - 0.5
    drawn = np.zeros((HEIGHT, WIDTH), np.uint8)
    cv2.fillPoly(drawn, [pixels.round().astype(np.int32)], 1)
    assert (drawn.astype(bool) == masks()[0]).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_picture_that_exif_turns_has_the_size_as_it_is_shown(start_backend, kind):
    from PIL import Image

    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6  # a quarter turn: a camera that was held upright
    Image.new("RGB", (HEIGHT, WIDTH)).save(file, kind, exif=exif)
    (prediction,) = start_backend().post("/predict", json=asked(inline(file.getvalue()))).json()["results"]
    box = of_kind(prediction, "rectanglelabels")[0]
    assert (box["original_width"], box["original_height"]) == (WIDTH, HEIGHT)
    assert (box["value"]["x"], box["value"]["y"], box["value"]["width"]) == (10.0, 20.0, 40.0)


def test_threshold_is_that_of_the_options(start_backend, png):
    (prediction,) = start_backend(score_thr=0.5).post("/predict", json=asked(inline(png))).json()["results"]
    assert len(of_kind(prediction, "rectanglelabels")) == 1


def test_task_that_fails_does_not_fail_the_others(start_backend, png):
    answer = start_backend().post("/predict", json=asked(inline(png), "data:image/png;base64,AAAA")).json()
    good, bad = answer["results"]
    assert good["result"] and not bad["result"] and bad["error"]["code"] == "undecodable_frame"


@pytest.mark.parametrize(
    ("image", "status", "code"),
    [
        ("http://169.254.169.254/latest/meta-data", 403, "reference_refused"),
        ("http://127.0.0.1:22/", 403, "reference_refused"),
        ("file:///etc/passwd", 403, "reference_refused"),
        ("/data/upload/1/x.png", 403, "reference_refused"),
        ("/data/local-files/?d=/etc/passwd", 403, "reference_refused"),
        ("../../etc/passwd", 403, "reference_refused"),
        ("s3://bucket/x.png", 403, "reference_refused"),
        ("data:image/png,plain", 400, "bad_request"),
        ("data:image/png;base64,!!", 400, "bad_request"),
        ("data:image/png;base64,é", 400, "bad_request"),
        (5, 400, "bad_request"),
        (None, 400, "bad_request"),
    ],
)
def test_image_from_elsewhere_is_refused(start_backend, image, status, code):
    answer = start_backend().post("/predict", json=asked(image))
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


def test_local_files_are_read_from_their_folder_alone(start_backend, png, tmp_path):
    folder = tmp_path / "images"
    (folder / "a").mkdir(parents=True)
    (folder / "a" / "one.png").write_bytes(png)
    (tmp_path / "secret.png").write_bytes(png)
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    client = start_backend(local_files=folder)

    def status(name: str) -> int:
        return client.post("/predict", json=asked(f"/data/local-files/?d={name}")).status_code

    assert status("a/one.png") == 200
    assert status("../secret.png") == status("link.png") == 403
    assert status("a/../../secret.png") == 403 and status(f"{tmp_path}/secret.png") == 404  # below the folder
    assert status("none.png") == 404 and status("a") == 403
    elsewhere = "https://labels.example/ls/data/local-files/?d="  # a Label Studio that knows its own address
    assert client.post("/predict", json=asked(f"{elsewhere}a/one.png")).status_code == 200
    assert client.post("/predict", json=asked(f"{elsewhere}../secret.png")).status_code == 403
    assert (
        start_backend(local_files=folder, max_image_bytes=10)
        .post("/predict", json=asked("/data/local-files/?d=a/one.png"))
        .status_code
        == 413
    )


class Uploads:
    """Label Studio's uploads; a redirect leads to another host."""

    def __init__(self, png: bytes) -> None:
        self.png = png
        self.asked: list[tuple[str, str]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return
        headers = dict(scope["headers"])
        self.asked.append((scope["path"], headers.get(b"authorization", b"").decode()))
        moved = scope["path"].endswith("moved.png")
        status, extra = (302, [(b"location", b"http://127.0.0.1:1/data/x.png")]) if moved else (200, [])
        await send({"type": "http.response.start", "status": status, "headers": extra})
        await send({"type": "http.response.body", "body": b"" if moved else self.png})


def test_uploads_are_read_from_label_studio_with_its_token(start_backend, background, png):
    uploads = Uploads(png)
    listening = Listening(background, uploads, lifespan="off")
    try:
        client = start_backend(label_studio_url=listening.url, label_studio_token="secret")
        for image in ("/data/upload/1/x.png", f"{listening.url}/data/upload/1/y.png"):
            assert client.post("/predict", json=asked(image)).status_code == 200
        assert uploads.asked == [
            ("/data/upload/1/x.png", "Token secret"),
            ("/data/upload/1/y.png", "Token secret"),
        ]
        for image in (
            "/api/projects",
            "/data/../api/x",
            "/data/upload/moved.png",
            "http://127.0.0.1:1/data/x.png",
        ):
            answer = client.post("/predict", json=asked(image))
            assert answer.status_code == 403, image
        assert len(uploads.asked) == 3  # with the one that redirects
        client = start_backend(label_studio_url=f"{listening.url}/ls/", label_studio_token="secret")
        for image in (
            "/data/upload/1/x.png",
            "/ls/data/upload/1/x.png",
            f"{listening.url}/ls/data/upload/1/x.png",
        ):
            assert client.post("/predict", json=asked(image)).status_code == 200
        assert uploads.asked[3:] == [("/ls/data/upload/1/x.png", "Token secret")] * 3
    finally:
        listening.close()


def test_backend_asks_for_user_and_password(start_backend, png):
    client = start_backend(basic_auth="user:word")
    assert client.post("/predict", json=asked(inline(png))).status_code == 401
    assert client.post("/predict", json=asked(inline(png)), auth=("user", "other")).status_code == 401
    assert client.post("/predict", json=asked(inline(png)), auth=("user", "word")).status_code == 200
    assert client.get("/health").status_code == 200


@pytest.mark.parametrize(
    "config",
    [
        None,
        "",
        "<View/>",
        "<View><Image name='i' value='$image'/><Choices name='c' toName='i'/></View>",
        "<!DOCTYPE x [<!ENTITY a 'b'>]><View>&a;</View>",
        "<View>",
        "x" * 300_000,
    ],
)
def test_config_without_a_control_for_objects_is_rejected(start_backend, config):
    answer = start_backend().post("/validate", json={"config": config})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "bad_request")


def code_of(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


def with_labels(*labels: str) -> str:
    inner = "".join(f"<Label value='{label}'/>" for label in labels)
    control = f"<RectangleLabels name='box' toName='i'>{inner}</RectangleLabels>"
    return f"<View><Image name='i' value='$image'/>{control}</View>"


@pytest.mark.parametrize(
    ("labels", "says"), [((), "add one for each class"), (("Street", "Sky"), "add predicted_values")]
)
def test_config_that_no_prediction_can_fill_is_rejected_with_what_to_change(start_backend, png, labels, says):
    client, config = start_backend(), with_labels(*labels)
    for answer in (
        client.post("/setup", json={"schema": config}),
        client.post("/validate", json={"config": config}),
        client.post("/predict", json=asked(inline(png), config=config)),
    ):
        assert code_of(answer) == (400, "bad_request")
        assert says in answer.json()["error"]["message"]


def test_config_is_accepted_if_the_gateway_cannot_be_asked_for_the_classes(start_backend, free_ports):
    client = start_backend(gateway_url=f"http://127.0.0.1:{free_ports(1)[0]}")
    assert client.post("/setup", json={"schema": with_labels("Street")}).status_code == 200


JSON = {"content-type": "application/json; charset=utf-8"}


def test_requests_have_limits(start_backend, png):
    client = start_backend(max_tasks=2, max_request_bytes=4096)
    assert client.post("/predict", json=asked("a", "b", "c")).status_code == 413
    assert client.post("/predict", content=b"[" * 5000, headers=JSON).status_code == 413
    assert client.post("/predict", content=b"nonsense", headers=JSON).status_code == 400
    assert client.post("/predict", json=[]).status_code == 400
    assert client.post("/predict", json={**asked(), "tasks": {}}).status_code == 400


@pytest.mark.parametrize("path", ["/predict", "/setup", "/validate", "/train", "/webhook"])
@pytest.mark.parametrize("media_type", [None, "text/plain", "application/x-www-form-urlencoded"])
def test_body_that_a_page_of_another_site_can_send_is_refused(start_backend, path, media_type):
    headers = {} if media_type is None else {"content-type": media_type}
    answer = start_backend().post(path, content=json.dumps({"config": CONFIG, **asked("x")}), headers=headers)
    assert code_of(answer) == (400, "bad_request")


def test_bytes_of_all_requests_together_are_bounded(start_backend, png):
    client = start_backend(max_request_bytes=4096, max_pending_bytes=4096)
    started, ended = threading.Event(), threading.Event()

    def slow() -> Iterator[bytes]:
        yield b'{"project": "' + b"x" * 3000
        started.set()
        ended.wait(20)
        yield b'"}'

    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(lambda: client.post("/train", content=slow(), headers=JSON).status_code)
        try:
            assert started.wait(20)
            refused = eventually(lambda: is_refused(client.post("/train", content=b" " * 2000, headers=JSON)))
            assert refused.headers["retry-after"] == "1"
        finally:
            ended.set()
        assert held.result() == 201
    assert code_of(client.post("/train", content=b" " * 2000, headers=JSON)) == (
        400,
        "bad_request",
    )  # room again


def is_refused(answer: httpx.Response) -> httpx.Response | None:
    return answer if answer.status_code == 429 else None


def test_request_that_does_not_arrive_is_given_up_and_its_bytes_are_free(start_backend):
    client = start_backend(max_request_bytes=4096, max_pending_bytes=4096, body_timeout_s=0.1)
    with socket.create_connection((client.base_url.host, client.base_url.port)) as connection:
        head = "POST /train HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 4000\r\n\r\n"
        connection.sendall(head.encode() + b" " * 3000)
        assert connection.recv(100).startswith(b"HTTP/1.1 408 ")
    assert code_of(client.post("/train", content=b" " * 4000, headers=JSON)) == (400, "bad_request")


def test_room_for_requests_is_at_least_the_largest_one():
    with pytest.raises(SettingsError):
        LabelStudioOptions(max_request_bytes=4096, max_pending_bytes=2048)


def test_text_that_is_no_base64_fails_its_task_alone(start_backend, png):
    answer = start_backend().post("/predict", json=asked(inline(png), "data:image/png;base64,é"))
    good, bad = answer.json()["results"]
    assert good["result"] and bad["error"]["code"] == "bad_request"


def test_model_must_be_named():
    with pytest.raises(SettingsError, match="--model"):
        create_backend(LabelStudioOptions())


@pytest.mark.parametrize("mask", [np.zeros((3, 5), bool), np.ones((4, 6), bool), *masks()])
def test_mask_of_cvat_is_what_its_own_sdk_encodes(mask):
    theirs = pytest.importorskip("cvat_sdk.masks", reason="needs cvat-sdk")
    found = cvat_mask(mask)
    if not mask.any():
        assert found == []
        return
    assert found == theirs.encode_mask(mask)
    height, width = mask.shape
    assert (theirs.decode_mask(found, image_width=width, image_height=height) == mask).all()
    json.dumps(found)

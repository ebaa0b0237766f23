"""Label configs: which label a class gets, and which images a task has."""

from __future__ import annotations

import io

import pytest

from serve.client import Result
from serve.errors import BadRequest
from serve.labelling.label_config import ImageTag, read_label_config
from serve.labelling.predictions import join_predictions, make_regions
from tests.gateway.fake_torchserve import FakeModel
from tests.labelling.calls import asked, inline, of_kind


def config(labels: str, images: str = '<Image name="picture" value="$image"/>', to: str = "picture") -> str:
    box = f'<RectangleLabels name="box" toName="{to}">{labels}</RectangleLabels>'
    return f"<View>{images}<View>{box}</View></View>"


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ('<Label value="Car"/>', {"Car": "Car"}),
        ('<Label value="Car" hint="any car" hotkey="c"/>', {"Car": "Car"}),
        ('<Label value="Car" alias="vehicle"/>', {"Car": "vehicle", "vehicle": "vehicle"}),
        (
            '<Label value="Auto" alias="vehicle" predicted_values="Car, Van"/>',
            {"Auto": "vehicle", "vehicle": "vehicle", "Car": "vehicle", "Van": "vehicle"},
        ),
        (
            '<Label value="Person" predicted_values="Car"/><Label value="Car"/>',
            {"Person": "Person", "Car": "Car"},
        ),
        ('<View><Label value="Car"/></View><!-- nested -->', {"Car": "Car"}),
    ],
)
def test_class_gets_the_label_that_label_studio_stores(labels, expected):
    (control,) = read_label_config(config(labels))
    assert control.labels == expected


def test_region_of_a_label_with_an_alias_is_valid_for_label_studios_own_sdk():
    interface = pytest.importorskip("label_studio_sdk.label_interface", reason="needs label-studio-sdk")
    text = config('<Label value="Auto" alias="vehicle" predicted_values="Car"/>')
    found = Result({"bboxes": [[0, 0, 4, 4]], "scores": [0.9], "labels": [0], "names": ["Car"]}, b"", {})
    prediction = join_predictions(make_regions(found, read_label_config(text), (8, 8)), "m")
    assert prediction["result"]
    assert interface.LabelInterface(text).validate_prediction(prediction, return_errors=True) == []


@pytest.mark.parametrize(
    ("tag", "data", "expected"),
    [
        (ImageTag("i", "$image"), {"image": "a"}, ["a"]),
        (ImageTag("i", "$image"), {"image": ""}, []),
        (ImageTag("i", "$image"), {"picture": "a"}, []),
        (ImageTag("i", "$views.front"), {"views": {"front": "a"}}, ["a"]),
        (ImageTag("i", "$views.front"), {"views.front": "a"}, ["a"]),
        (ImageTag("i", "$pages[1]"), {"pages": ["a", "b"]}, ["b"]),
        (ImageTag("i", "$pages[2]"), {"pages": ["a", "b"]}, []),
        (ImageTag("i", "$a.b"), {"a": 5}, []),
        (ImageTag("i", "https://host/$name.jpg"), {"name": "x", "name.jpg": "y"}, ["https://host/y"]),
        (ImageTag("i", "https://host/$id"), {"id": 7}, ["https://host/7"]),
        (ImageTag("i", "https://host/$id"), {}, []),
        (ImageTag("i", "$pages", is_list=True), {"pages": ["a", "b"]}, ["a", "b"]),
        (ImageTag("i", "$pages", is_list=True), {"pages": "a"}, []),
    ],
)
def test_image_is_found_where_its_tag_says(tag, data, expected):
    assert tag.find(data) == expected


def test_control_of_two_images_is_for_each():
    both = '<Image name="left" value="$l"/><Image name="right" value="$r"/>'
    controls = read_label_config(config('<Label value="Car"/>', both, "left,right"))
    assert [(each.from_name, each.image.name) for each in controls] == [("box", "left"), ("box", "right")]


def test_list_of_images_goes_before_a_single_one():
    both = '<Image name="picture" value="$cover" valueList="$pages"/>'
    (control,) = read_label_config(config('<Label value="Car"/>', both))
    assert control.image == ImageTag("picture", "$pages", is_list=True)


def test_image_without_a_variable_is_none():
    with pytest.raises(BadRequest):
        read_label_config(
            config('<Label value="Car"/>', '<Image name="picture" value="https://host/a.jpg"/>')
        )


TWO = (
    '<View><Image name="left" value="$l"/><Image name="right" value="$r"/>'
    '<RectangleLabels name="a" toName="left"><Label value="Car"/></RectangleLabels>'
    '<RectangleLabels name="b" toName="right"><Label value="Pedestrian"/></RectangleLabels></View>'
)


def test_every_image_of_a_task_is_predicted(start_backend, served, png):
    task = {"id": 1, "data": {"l": inline(png), "r": inline(png)}}
    answer = start_backend().post("/predict", json={**asked(config=TWO), "tasks": [task]}).json()
    regions = [(each["from_name"], each["to_name"]) for each in answer["results"][0]["result"]]
    assert regions == [("a", "left"), ("b", "right")]
    assert answer["results"][0]["score"] == pytest.approx((0.9 + 0.4) / 2)
    assert sum(map(len, served.torchserve.calls)) == 2


def test_task_with_an_image_that_fails_has_no_regions(start_backend, png):
    tasks = [{"data": {"l": inline(png), "r": "data:image/png;base64,AAAA"}}, {"data": {"l": inline(png)}}]
    failed, found = (
        start_backend().post("/predict", json={**asked(config=TWO), "tasks": tasks}).json()["results"]
    )
    assert not failed["result"] and failed["error"]["code"] == "undecodable_frame"
    assert [each["to_name"] for each in found["result"]] == ["left"]  # the task has no other image


def test_regions_of_a_list_of_images_are_numbered(start_backend, png):
    pages = config('<Label value="Car"/>', '<Image name="picture" valueList="$pages"/>')
    client = start_backend(max_tasks=2)
    task = {"data": {"pages": [inline(png), inline(png)]}}
    (found,) = client.post("/predict", json={**asked(config=pages), "tasks": [task]}).json()["results"]
    assert [each["item_index"] for each in found["result"]] == [0, 1]
    task = {"data": {"pages": [inline(png)] * 3}}
    assert client.post("/predict", json={**asked(config=pages), "tasks": [task]}).status_code == 413


def test_picture_of_one_pixel_is_labelled_within_it(start_backend):
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (1, 1)).save(file, "PNG")
    (found,) = start_backend().post("/predict", json=asked(inline(file.getvalue()))).json()["results"]
    for region in of_kind(found, "rectanglelabels"):
        assert region["value"]["x"] + region["value"]["width"] <= 100 and region["original_width"] == 1


@pytest.mark.parametrize(
    ("options", "status", "code"),
    [
        ({"model": "clouds"}, 400, "bad_request"),
        ({"model": "nothing"}, 404, "model_not_found"),
        ({"version": "9.0"}, 404, "model_not_found"),
    ],
)
def test_model_that_cannot_label_is_an_error_when_it_is_connected(start_backend, options, status, code):
    answer = start_backend(**options).post("/setup", json={"schema": config('<Label value="Car"/>')})
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


def test_key_that_the_gateway_refuses_is_no_401_of_the_backend(start_gateway, start_backend, torchserve, png):
    torchserve.models = {"images": {"1.0": FakeModel({"modality": "image", "classes": ["Car"]})}}
    client = start_backend(gateway_url=start_gateway(api_keys=("secret",)).url, api_key="another")
    for path, sent in (
        ("/setup", {"schema": config('<Label value="Car"/>')}),
        ("/predict", asked(inline(png))),
    ):
        answer = client.post(path, json=sent)
        assert (answer.status_code, answer.json()["error"]["code"]) == (502, "backend_broken")
        assert "www-authenticate" not in answer.headers and "API_KEY" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "status"), [("POST", "/job_status", 404), ("GET", "/predict", 405)]
)
def test_unknown_call_is_answered_as_json(start_backend, method, path, status):
    answer = start_backend().request(method, path)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, "bad_request")

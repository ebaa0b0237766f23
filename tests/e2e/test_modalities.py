"""Every modality over the handler: a batch gives what each frame gives alone, and what upstream's own call gives."""

from __future__ import annotations

import base64
import functools
import math

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from handlers.mmdet3d_handler import MMDet3DHandler
from handlers.mmdet_handler import MMDetHandler
from serve.compare.detections import Tolerances, compare_answers
from serve.compare.ties import VARIANTS, confirm_ties
from serve.errors import ClientError, UndecodableFrame
from serve.protocol.batch import FRAMES_CONTENT_TYPE, pack_frames
from serve.protocol.calibration import parse_calibration
from serve.verify.reference_loading import load_reference
from serve.verify.report import comparison_table
from tests.e2e.small_models import MODELS, make
from tests.worker.context import Context

# Folded batch norms and another order of sums are all that is between us and upstream.
SAME = Tolerances(box_m=1e-4, box_px=1e-2, yaw_rad=1e-4, score=1e-5, label_share=0.9999)
PARTS = {
    "mono3d": ["image", "calibration"],
    "fusion": ["points", "image", "calibration"],
    "depth": ["points"],
    "segments": ["points"],
    "panoptic": ["image"],
}


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """`small(name)`: a converted model, made once."""
    folder = tmp_path_factory.mktemp("small")
    return functools.lru_cache(lambda name: make(name, folder))


@pytest.fixture(scope="session")
def served(small):
    """`served(name)`: a handler with that model loaded."""

    @functools.lru_cache
    def load(name):
        opened = small(name).opened
        handler = MMDetHandler() if opened.metadata.package == "mmdet" else MMDet3DHandler()
        handler.initialize(Context(opened.root))
        return handler

    return load


def call(handler, *rows, headers=()):
    context = Context("", headers=headers)
    bodies = handler.handle(list(rows), context)
    return [(context.status[i][0], orjson.loads(body)) for i, body in enumerate(bodies)]


def row_of(opened) -> dict:
    frame = opened.golden_frame()
    return dict(frame) if isinstance(frame, dict) else {"body": frame}


def other_frame(row: dict) -> dict:
    """The same frame with every second point left out, or its picture darkened: another answer, the same shape."""
    import cv2

    changed = dict(row)
    for name, body in row.items():
        if name == "points" or (name == "body" and not body.startswith(b"\x89PNG")):
            # 24 floats divide by every width of a point in these tests.
            numbers = np.frombuffer(body, np.float32)
            changed[name] = numbers[: len(numbers) // 48 * 24].tobytes()
        elif name != "calibration":
            picture = cv2.imdecode(np.frombuffer(body, np.uint8), cv2.IMREAD_COLOR)
            changed[name] = cv2.imencode(".png", picture[:, ::-1])[1].tobytes()
    return changed


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_batch_equals_single_frames_and_upstream(name, small, served):
    model, handler = small(name), served(name)
    first = row_of(model.opened)
    second = other_frame(first)
    ((status, one),) = call(handler, first)
    assert status == 200, one
    ((_, two),) = call(handler, second)
    together = call(handler, first, second, first)
    assert [status for status, _ in together] == [200] * 3
    for alone, (_, batched) in zip((one, two, one), together, strict=True):
        found = compare_answers(alone, batched, SAME, sides=("alone", "together"))
        assert found.ok, comparison_table(found)
    reference = load_reference(model.config, model.checkpoint, "cpu")
    native = reference.detect(model.files())
    # A vote within a rounding of a ball's radius is a neighbour on one side only, which moves that ball's box.
    variants = (reference.detect(model.files(), k) for k in range(1, VARIANTS + 1))
    found = confirm_ties(compare_answers(native, one), native, one, variants)
    assert found.ok and (name == "depth" or not getattr(found, "ties", 0)), comparison_table(found)
    assert len(one.get("names", one.get("segments_info", one.get("pts_semantic_mask")))) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", PARTS)
def test_handler_describes_its_parts(name, served):
    said = served(name).describe()
    assert said["parts"] == PARTS[name]
    assert served(name).self_test_s > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mono3d", "fusion"])
def test_parts_arrive_as_fields_json_or_framed_batch(name, small, served):
    parts = row_of(small(name).opened)
    document = {
        part: orjson.loads(body) if part == "calibration" else {"b64": base64.b64encode(body).decode()}
        for part, body in parts.items()
    }
    framed = pack_frames([(parts, {"max_detections": 2})])
    rows = [
        {**parts, "max_detections": b"2"},
        {**parts, "calibration": document["calibration"], "max_detections": "2"},
        {"body": orjson.dumps({**document, "max_detections": 2})},
        {"body": {**document, "max_detections": 2}},
        {"body": framed},
    ]
    headers = [{}, {}, {"content-type": "application/json"}, {}, {"content-type": FRAMES_CONTENT_TYPE}]
    answers = call(served(name), *rows, headers=headers)
    assert [status for status, _ in answers] == [200] * 5
    plain = [answer for _, answer in answers[:4]] + [answers[4][1]["outcomes"][0]["answer"]]
    for answer in plain:
        found = compare_answers(plain[0], answer, SAME)
        assert found.ok and len(answer["names"]) <= 2, comparison_table(found)


@pytest.mark.slow
def test_missing_or_superfluous_part_is_named(small, served):
    parts = row_of(small("mono3d").opened)
    without = {name: body for name, body in parts.items() if name != "calibration"}
    rows = [
        without,
        {"body": parts["image"]},
        {**parts, "points": b"1234"},
        {**parts, "image.CAM_FRONT": parts["image"]},
        {"calibration": parts["calibration"]},
        {**parts, "data": parts["image"]},
        {**parts, "calibration": b"{}"},
        {**parts, "calibration": b"[1]"},
        {**parts, "image": parts["image"][:-20]},
        parts,
    ]
    answers = call(served("mono3d"), *rows)
    assert [status for status, _ in answers] == [400] * 6 + [422] * 3 + [200]
    messages = [answer["error"]["message"] for _, answer in answers[:-1]]
    assert all("image, calibration" in message for message in messages[:5])
    assert "points" in messages[2] and "missing: image" in messages[4]
    assert "lacks cam2img" in messages[6]


def test_single_part_model_rejects_other_parts(ask, street):
    status, document = ask({"points": street.tobytes(), "calibration": b"{}"})[0]
    assert (status, document["error"]["code"]) == (400, "bad_request")
    assert "calibration" in document["error"]["message"]
    assert ask({"points": street.tobytes()})[0][0] == 200


@pytest.mark.slow
def test_empty_point_cloud_gives_no_labels_and_no_boxes(served):
    for name, field in (("segments", "pts_semantic_mask"), ("depth", "bboxes_3d")):
        ((status, answer),) = call(served(name), {"body": b"", "num_points": b"0"})
        assert status == 200 and (answer[field] == [] or answer[field]["shape"] == [0])


GOOD = {"cam2img": np.eye(3).tolist(), "lidar2cam": np.eye(4).tolist()}


def test_missing_lidar2img_is_computed_as_a_product():
    cam2img = [[500, 0, 320], [0, 500, 240], [0, 0, 1]]
    found = parse_calibration(orjson.dumps({**GOOD, "cam2img": cam2img}), ("lidar2img",))
    np.testing.assert_allclose(found["lidar2img"][:3, :3], cam2img)


@pytest.mark.parametrize(
    ("document", "says"),
    [
        ({**GOOD, "cam2img": [[1, 2], [3, 4]]}, "cam2img .* list of rows, 3 x 3 or 3 x 4 or 4 x 4"),
        ({**GOOD, "lidar2cam": np.eye(3).tolist()}, "4 x 4"),
        ({**GOOD, "cam2img": [[1, 0, 0], [0, 1, 0], [0, 0, None]]}, "finite"),
        ({**GOOD, "cam2img": [[1, 0, 0], [0, 1, 0], [0, 0, "1"]]}, "finite"),
        ({**GOOD, "cam2img": [[1, 0, 0], [0, 1, 0], [0, 0, 1e300]]}, "finite"),
        ({**GOOD, "cam2img": [[1, 0, 0], [0, 1, 0], [0, 0]]}, "list of rows"),
        ({**GOOD, "P2": np.eye(4).tolist()}, "P2.*cam2img"),
        ({"lidar2cam": np.eye(4).tolist()}, "lacks cam2img"),
    ],
)
def test_malformed_calibration_is_rejected(document, says):
    with pytest.raises(UndecodableFrame, match=says):
        parse_calibration(orjson.dumps(document), ("cam2img",))


def test_nan_in_a_calibration_is_rejected():
    body = b'{"cam2img": [[1, 0, 0], [0, NaN, 0], [0, 0, Infinity]]}'
    with pytest.raises(UndecodableFrame, match="calibration cannot be read"):
        parse_calibration(body, ("cam2img",))


def test_every_camera_needs_a_calibration():
    body = orjson.dumps({"CAM_FRONT": GOOD})
    assert set(parse_calibration(body, ("cam2img",), ("CAM_FRONT",))) == {"CAM_FRONT"}
    with pytest.raises(UndecodableFrame, match="CAM_FRONT, CAM_BACK"):
        parse_calibration(body, ("cam2img",), ("CAM_FRONT", "CAM_BACK"))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=200, deadline=None)
@given(
    document=st.dictionaries(st.sampled_from(["cam2img", "lidar2cam", "x"]), JSON) | JSON,
    raw=st.binary(max_size=40),
)
def test_any_calibration_document_parses_or_raises_client_error(document, raw):
    import json

    for body in (json.dumps(document).encode(), raw):
        for cameras in ((), ("cam2img",)):
            try:
                found = parse_calibration(body, ("cam2img",), cameras)
            except ClientError as error:
                assert str(error)
            else:
                matrix = found["cam2img"] if not cameras else found["cam2img"]["cam2img"]
                assert all(math.isfinite(value) for value in np.ravel(matrix))

"""``POST /predictions``: one or many frames, in every request and response format."""

from __future__ import annotations

import base64
import io
import itertools
import json
import re
import threading

import cv2
import httpx
import numpy as np
import ormsgpack
import pytest
from PIL import Image

from serve.protocol.batch import FRAMES_CONTENT_TYPE, pack_frames
from tests.gateway.conftest import NO_TLS
from tests.gateway.fake_torchserve import FUSION, IMAGES, SWEEPS, FakeModel, answer_for
from tests.gateway.running import eventually

NDJSON = {"accept": "application/x-ndjson"}
FRAMED = {"content-type": FRAMES_CONTENT_TYPE}


@pytest.mark.parametrize("method", ["POST", "PUT"])
@pytest.mark.parametrize("path", ["/predictions/second", "/predictions/second/1.0"])
def test_answer_is_the_workers_byte_for_byte(gateway, cloud, method, path):
    answer = gateway.client.request(method, path, content=cloud(1))
    assert answer.status_code == 200 and answer.headers["content-type"] == "application/json"
    assert answer.content == answer_for(cloud(1), {})


def test_options_come_from_query_or_headers(gateway, cloud, torchserve):
    query = gateway.post("/predictions/second?score_thr=0.3&max_detections=2", content=cloud(1)).json()
    assert query["options"] == {"score_thr": 0.3, "max_detections": 2}
    headers = gateway.post(content=cloud(1), headers={"X-Score-Thr": "0.25", "X-Load-Dim": "4"}).json()
    assert headers["options"] == {"score_thr": 0.25, "load_dim": 4}
    both = gateway.post("/predictions/second?score_thr=0.3", content=cloud(1), headers={"X-Score-Thr": "0.2"})
    assert both.json()["options"] == {"score_thr": 0.3}


@pytest.mark.parametrize(
    ("query", "named"),
    [
        (
            "colour=red",
            "timeout_ms, camera, track_session, track_start, track_end, frame_time_s, class_thr, classes, columns, "
            "fields, load_dim, max_detections",
        ),
        ("score_thr=2", "score_thr"),
        ("score_thr=nan", "score_thr"),
        ("score_thr=", "score_thr"),
        ("max_detections=-1", "max_detections"),
        ("max_detections=" + "9" * 5000, "max_detections"),
        ("num_points=x", "num_points"),
        ("timeout_ms=0", "timeout_ms"),
        ("timeout_ms=soon", "timeout_ms"),
        ("timeout_ms=nan", "timeout_ms"),
        ("timeout_ms=300001", "300000"),
    ],
)
def test_unknown_or_invalid_option_returns_400(gateway, cloud, torchserve, query, named):
    answer = gateway.post(f"/predictions/second?{query}", content=cloud(1))
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "unknown_option"
    assert named in answer.json()["error"]["message"]
    assert not torchserve.calls


def test_timeout_may_come_in_a_header(gateway, cloud):
    answer = gateway.post(content=cloud(1), headers={"X-Timeout-Ms": "0.5"})
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "unknown_option"


def test_form_with_one_file_is_one_frame(gateway, cloud, torchserve):
    answer = gateway.post(files={"data": cloud(1)}, data={"score_thr": "0.5"})
    assert answer.content == answer_for(cloud(1), {"score_thr": 0.5})


def test_form_with_many_files_is_answered_in_order_with_one_error(gateway, cloud, torchserve):
    files = [("data", cloud(1)), ("data", b"bad!"), ("data", cloud(2))]
    answer = gateway.post(files=files, headers={"x-request-id": "mine"})
    assert answer.status_code == 200
    first, second, third = answer.json()
    assert (first["frame"], third["frame"]) == tuple(
        json.loads(answer_for(cloud(i), {}))["frame"] for i in (1, 2)
    )
    assert second == {"error": {"code": "undecodable_frame", "message": "bad frame", "request_id": "mine"}}
    assert len(torchserve.calls) == 1  # one request's frames ride together


@pytest.mark.parametrize(
    ("form", "code"),
    [
        ({"files": {"picture": b"abc"}}, "bad_request"),
        ({"data": {"score_thr": "0.5"}, "files": {}}, "bad_request"),
        ({"data": {"b64": "AAAA"}, "files": {"data": b"abc"}}, "bad_request"),
        ({"data": {"colour": "red"}, "files": {"data": b"abc"}}, "unknown_option"),
        (
            {"data": {"colour": "red"}, "files": [("data", b"abc"), ("data", b"def")]},
            "unknown_option",
        ),
        (
            {"content": b"--nonsense", "headers": {"content-type": "multipart/form-data; boundary=b"}},
            "bad_request",
        ),
        (
            {"content": b"nonsense", "headers": {"content-type": "multipart/form-data; boundary=b"}},
            "bad_request",
        ),
        ({"content": b"nonsense", "headers": {"content-type": "multipart/form-data"}}, "bad_request"),
    ],
)
def test_invalid_form_returns_400(gateway, form, code):
    if form.get("files") == {}:
        boundary = b'--b\r\ncontent-disposition: form-data; name="score_thr"\r\n\r\n0.5\r\n--b--\r\n'
        form = {"content": boundary, "headers": {"content-type": "multipart/form-data; boundary=b"}}
    answer = gateway.post(**form)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, code), answer.text


def test_first_line_arrives_while_the_other_frame_still_runs(start_gateway, backend, cloud):
    backend.app.models["second"]["1.0"].workers = [1, 2]
    gateway = start_gateway(batch_frames=1)
    backend.hold(cloud(0))
    files = [("data", cloud(0)), ("data", cloud(1)), ("data", b"bad!")]
    with gateway.client.stream("POST", "/predictions/second", files=files, headers=NDJSON) as answer:
        lines = answer.iter_lines()
        first, second = json.loads(next(lines)), json.loads(next(lines))
        assert backend.app.held == 1
        assert first == {"index": 1, "status": 200, "answer": json.loads(answer_for(cloud(1), {}))}
        assert (second["index"], second["status"], second["error"]["code"]) == (2, 422, "undecodable_frame")
        assert set(second["error"]) == {"code", "message", "request_id"}
        backend.release()
        assert json.loads(next(lines))["index"] == 0
        assert next(lines, None) is None


def test_framed_batch_is_answered_in_the_handlers_format(gateway, cloud, torchserve):
    body = pack_frames([(cloud(1), {"max_detections": 2}), (b"bad!", {}), (cloud(2), {"colour": "red"})])
    answer = gateway.post("/predictions/second?score_thr=0.5", content=body, headers=FRAMED)
    outcomes = answer.json()["outcomes"]
    assert [outcome["status"] for outcome in outcomes] == [200, 422, 400]
    assert outcomes[0]["answer"]["options"] == {"score_thr": 0.5, "max_detections": 2}
    assert outcomes[2]["error"]["code"] == "unknown_option"
    assert len(torchserve.calls) == 1 and len(torchserve.calls[0]) == 2
    assert gateway.post(content=pack_frames([]), headers=FRAMED).json() == {"outcomes": []}
    assert gateway.post(content=b"abc", headers=FRAMED).status_code == 400


@pytest.mark.parametrize(
    "accept", ["application/x-msgpack", "application/msgpack", "application/vnd.msgpack;q=0.5"]
)
def test_messagepack_answer_equals_the_json_answer(gateway, cloud, accept):
    answer = gateway.post(content=cloud(1), headers={"accept": accept})
    assert answer.headers["content-type"] == "application/x-msgpack"
    assert ormsgpack.unpackb(answer.content) == json.loads(answer_for(cloud(1), {}))
    files = [("data", cloud(1)), ("data", b"bad!")]
    many = gateway.post(files=files, headers={"accept": accept})
    assert ormsgpack.unpackb(many.content)[0] == json.loads(answer_for(cloud(1), {}))


def test_png_of_a_point_cloud_is_returned(gateway, cloud):
    answer = gateway.post(content=cloud(1, 500), headers={"accept": "image/png"})
    assert answer.status_code == 200 and answer.headers["content-type"] == "image/png"
    assert Image.open(io.BytesIO(answer.content)).size[0] > 100
    empty = gateway.post("/predictions/second?num_points=0", content=b"", headers={"accept": "image/*"})
    assert empty.headers["content-type"] == "image/png"
    many = gateway.post(files=[("data", cloud(1)), ("data", cloud(2))], headers={"accept": "image/png"})
    assert (many.status_code, many.json()["error"]["code"]) == (400, "bad_request")


def test_png_of_an_npy_point_cloud_is_returned(gateway):
    stream = io.BytesIO()
    np.save(stream, np.random.default_rng(1).normal(size=(50, 4)))
    answer = gateway.post(content=stream.getvalue(), headers={"accept": "image/png"})
    assert answer.status_code == 200 and answer.headers["content-type"] == "image/png"


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        (None, "application/json"),
        ("*/*", "application/json"),
        ("application/x-msgpack;q=0.4, application/json;q=0.5", "application/json"),
        ("text/html, application/x-msgpack", "application/x-msgpack"),
        ("application/json;q=0, */*", "application/x-msgpack"),
    ],
)
def test_accept_header_selects_the_best_media_type(gateway, cloud, accept, kind):
    headers = {"accept": accept} if accept else {}
    answer = gateway.post(content=cloud(1), headers=headers)
    assert answer.headers["content-type"] == kind


@pytest.mark.parametrize("accept", ["text/html", "application/json;q=0", "application/json;q=x", ","])
def test_unsatisfiable_accept_header_returns_406(gateway, cloud, accept, torchserve):
    answer = gateway.post(content=cloud(1), headers={"accept": accept})
    assert answer.status_code == 406 and answer.json()["error"]["code"] == "not_acceptable"
    assert not torchserve.calls


@pytest.mark.parametrize("wrapped", [True, False])
def test_frame_may_come_as_base64_in_json(gateway, cloud, wrapped):
    encoded = base64.b64encode(cloud(1)).decode()
    answer = gateway.post(json={"b64": encoded, "score_thr": 0.5} if wrapped else encoded)
    assert answer.content == answer_for(cloud(1), {"score_thr": 0.5} if wrapped else {})


@pytest.mark.parametrize(
    "body", [b"{", b"[]", b"{}", b'{"b64": 5}', b'{"b64": "=!"}', b"[" * 5000, b"\xff", b""]
)
def test_json_without_a_frame_returns_400(gateway, body, torchserve):
    answer = gateway.post(content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "bad_request"
    assert not torchserve.calls


def test_compressed_body_returns_400(gateway, cloud):
    answer = gateway.post(content=cloud(1), headers={"content-encoding": "gzip"})
    assert answer.status_code == 400 and "gzip" in answer.json()["error"]["message"]


def test_model_of_several_parts_takes_them_by_name(start_gateway, torchserve, cloud):
    torchserve.models["fusion"] = {"1.0": FakeModel(FUSION)}
    gateway = start_gateway()
    picture = cv2.imencode(".png", np.zeros((8, 8, 3), np.uint8))[1].tobytes()
    parts = {"points": cloud(1), "image": picture}
    answer = gateway.post("/predictions/fusion", files=parts, data={"calibration": "{}", "score_thr": "0.1"})
    assert answer.status_code == 200, answer.text
    assert answer.content == answer_for({**parts, "calibration": b"{}"}, {"score_thr": 0.1})
    twice = gateway.post("/predictions/fusion", files=[("points", cloud(1)), ("points", cloud(2))])
    assert (twice.status_code, twice.json()["error"]["code"]) == (400, "bad_request")
    in_json = {name: {"b64": base64.b64encode(part).decode()} for name, part in parts.items()}
    assert gateway.post("/predictions/fusion", json={**in_json, "calibration": {}}).content == answer_for(
        {**parts, "calibration": b"{}"}, {}
    )


def test_images_of_different_sizes_do_not_share_a_batch(start_gateway, backend):
    backend.app.models["faster-rcnn"] = {"1.0": FakeModel(IMAGES)}
    gateway = start_gateway()
    pictures = [
        cv2.imencode(".png", np.full((height, 8, 3), i, np.uint8))[1].tobytes()
        for i, height in enumerate((8, 16, 8, 16))
    ]
    answer = gateway.post("/predictions/faster-rcnn", files=[("image", picture) for picture in pictures])
    assert answer.status_code == 200 and isinstance(answer.json(), list), answer.text
    assert [entry["frame"] for entry in answer.json()] == [
        json.loads(answer_for(picture, {}))["frame"] for picture in pictures
    ]
    assert sorted(map(sorted, backend.app.calls)) == sorted(map(sorted, (pictures[::2], pictures[1::2])))
    bad = gateway.post("/predictions/faster-rcnn", files=[("image", pictures[0]), ("image", b"no image")])
    assert bad.json()[1]["error"]["code"] == "undecodable_frame"


def test_request_id_is_echoed_or_generated(gateway, cloud):
    assert (
        gateway.post(content=cloud(1), headers={"x-request-id": "my-17"}).headers["x-request-id"] == "my-17"
    )
    for unfit in ("", "a b", "x" * 129, "ü"):
        given = gateway.post(content=cloud(1), headers={b"x-request-id": unfit.encode("latin-1")})
        assert re.fullmatch("[0-9a-f]{32}", given.headers["x-request-id"])
    wrong = gateway.post("/predictions/nobody", content=b"", headers={"x-request-id": "my-18"})
    assert wrong.json()["error"]["request_id"] == wrong.headers["x-request-id"] == "my-18"


def test_server_timing_lists_the_stages(gateway, cloud):
    header = gateway.post(content=cloud(1)).headers["server-timing"]
    found = dict(re.findall(r"(\w+);dur=([0-9.]+)", header))
    assert list(found) == ["decode", "queue", "inference", "backend", "encode"]
    assert float(found["inference"]) == 2.0  # from the worker
    assert float(found["backend"]) > 0


def test_unknown_model_or_version_returns_404_with_the_available_ones(gateway, cloud, torchserve):
    for path in ("/predictions/nobody", "/predictions/second/9.9", "/predictions/a%2Fb"):
        answer = gateway.post(path, content=cloud(1))
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == (
            "model_not_found" if "%2F" not in path else answer.json()["error"]["code"]
        )
    for path, available in {"nobody": "second", "second/9.9": "1.0"}.items():
        message = gateway.post(f"/predictions/{path}").json()["error"]["message"]
        assert message.endswith(f"available: {available}")
    assert gateway.client.get("/predictions/second").status_code == 405


def test_sixty_four_concurrent_clients_each_get_their_own_boxes(gateway, cloud, torchserve, backend):
    wrong: list[str] = []

    def ask(number: int) -> None:
        # One connection each: httpx's pool, shared by so many threads, closes some that were just handed out.
        with httpx.Client(base_url=gateway.url, trust_env=False, timeout=60, verify=NO_TLS) as client:
            for round_ in range(5):
                frame = cloud(number * 100 + round_)
                answer = client.post("/predictions/second", content=frame)
                if answer.content != answer_for(frame, {}):
                    wrong.append(f"{number}: {answer.status_code} {answer.text[:200]}")

    backend.hold()
    threads = [threading.Thread(target=ask, args=(number,)) for number in range(64)]
    for thread in threads:
        thread.start()
    eventually(lambda: gateway.admission.items == 64, 30)
    backend.release()
    for thread in threads:
        thread.join()
    assert not wrong
    assert max(map(len, torchserve.calls)) > 1


def sweep_parts(cloud) -> dict[str, bytes]:
    poses = [{"time_lag_s": 0.05 * k, "transform": np.eye(4).tolist()} for k in (1, 2)]
    return {
        "points": cloud(1),
        "sweep.0": cloud(2),
        "sweep.1": cloud(3),
        "sweeps": json.dumps(poses, separators=(",", ":")).encode(),
    }


def test_frame_of_sweeps_comes_as_a_form_json_or_a_framed_batch(start_gateway, cloud, torchserve):
    torchserve.models["centerpoint"] = {"1.0": FakeModel(SWEEPS)}
    gateway = start_gateway()
    parts = sweep_parts(cloud)
    path = "/predictions/centerpoint"
    files = {name: (name, body) for name, body in parts.items()}
    as_files = gateway.post(path, files=files)
    assert as_files.content == answer_for(parts, {})
    texts = {name: body for name, body in files.items() if name != "sweeps"}
    as_text = gateway.post(path, files=texts, data={"sweeps": parts["sweeps"].decode(), "score_thr": "0.2"})
    assert as_text.content == answer_for(parts, {"score_thr": 0.2})
    (framed,) = gateway.post(path, content=pack_frames([(parts, {})]), headers=FRAMED).json()["outcomes"]
    assert framed["answer"]["frame"] == as_files.json()["frame"]

    def inline(name):
        return {"b64": base64.b64encode(parts[name]).decode()}

    poses = json.loads(parts["sweeps"])
    document = {
        "points": inline("points"),
        "sweeps": [{"points": inline(f"sweep.{k}"), **pose} for k, pose in enumerate(poses)],
    }
    wrapped = {**parts, "sweeps": json.dumps({"sweeps": poses}, separators=(",", ":")).encode()}
    assert gateway.post(path, json=document).content == answer_for(wrapped, {})
    several = gateway.post(path, json={"frames": [document, document], "score_thr": 0.5})
    assert [answer["frame"] for answer in several.json()] == [
        json.loads(answer_for(wrapped, {}))["frame"]
    ] * 2


def test_accumulated_sweeps_are_declared_in_query_header_form_or_json(start_gateway, cloud, torchserve):
    torchserve.models["centerpoint"] = {"1.0": FakeModel(SWEEPS)}
    gateway = start_gateway()
    path, expected = "/predictions/centerpoint", answer_for(cloud(1), {"sweeps": "accumulated"})
    assert gateway.post(f"{path}?sweeps=accumulated", content=cloud(1)).content == expected
    assert gateway.post(path, content=cloud(1), headers={"X-Sweeps": "accumulated"}).content == expected
    form = gateway.post(path, files={"data": cloud(1)}, data={"sweeps": "accumulated"})
    assert form.content == expected
    document = {"b64": base64.b64encode(cloud(1)).decode(), "sweeps": "accumulated"}
    assert gateway.post(path, json=document).content == expected
    assert gateway.post(f"{path}?sweeps=all", content=cloud(1)).status_code == 400


def test_models_show_columns_sweeps_and_warnings(start_gateway, torchserve):
    torchserve.models["centerpoint"] = {"1.0": FakeModel(SWEEPS)}
    gateway = start_gateway()
    gateway.post("/predictions/centerpoint", content=b"1234")
    (shown,) = [m for m in gateway.client.get("/models").json() if m["name"] == "centerpoint"]
    assert shown["sweeps"]["number"] == 10 and shown["columns"][3] == "intensity"
    assert [warning["code"] for warning in shown["warnings"]] == ["one_sweep"]


@pytest.mark.parametrize("sizes", [[1] * 300, [70_000, 1, 2, 300_000, 5], [100_000] * 9])
def test_frame_in_pieces_is_answered_as_in_one(gateway, start_gateway, torchserve, sizes):
    """Chunks of a body are sent on without joining them; the worker and a picture of the frame see one body."""
    whole = np.random.default_rng(0).bytes(sum(sizes) // 16 * 16 + 16)  # points of 16 bytes
    ends = [0, *itertools.accumulate(sizes), len(whole)]
    pieces = (whole[start:end] for start, end in itertools.pairwise(ends))
    answer = gateway.post(content=pieces)
    assert answer.content == answer_for(whole, {}), answer.text
    torchserve.models["faster-rcnn"] = {"1.0": FakeModel(IMAGES)}
    noise = np.random.default_rng(1).integers(0, 255, (400, 400, 3), np.uint8)
    picture = cv2.imencode(".png", noise)[1].tobytes()  # its header is read for its size
    gateway = start_gateway()
    pieces = (picture[start : start + 99_999] for start in range(0, len(picture), 99_999))
    answer = gateway.post("/predictions/faster-rcnn", content=pieces)
    assert answer.content == answer_for(picture, {}), answer.text

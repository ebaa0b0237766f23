"""Track sessions over HTTP: ids in the order of requests, within bounds, and never of another sequence."""

from __future__ import annotations

import base64
import json
import sys
from concurrent.futures import ThreadPoolExecutor

import cv2
import httpx
import numpy as np
import pytest

from serve.client import Client
from serve.errors import BadRequest, Overloaded, SessionNotFound
from serve.gateway.options import GatewayOptions
from serve.gateway.tracks import SessionKey, TrackRequest, TrackSessions
from tests.gateway.fake_torchserve import IMAGES, FakeModel, answer_for
from tests.gateway.running import eventually

PATH = "/predictions/second?track_session=drive"
START = f"{PATH}&track_start=true"
PICTURE = cv2.imencode(".png", np.zeros((8, 8, 3), np.uint8))[1].tobytes()


def test_ids_follow_the_workers_answer(gateway, cloud):
    first = gateway.post(START, content=cloud(1))
    assert first.status_code == 200
    whole = answer_for(cloud(1), {})
    assert first.content.startswith(whole[:-1] + b",")
    answer = first.json()
    count = len(json.loads(whole)["names"])
    assert len(answer["track_ids"]) == count and answer["track_ids"][0] == 1
    assert (answer["track_session"], answer["track_frame"]) == ("drive", 0)
    again = gateway.post(PATH, content=cloud(1)).json()
    assert (again["track_ids"], again["track_frame"]) == (answer["track_ids"], 1)


def serve_boxes_of_images(torchserve):
    """A model of images that finds one person, 5 pixels further on in each call."""
    found = iter(range(100, 1000, 5))

    def alter(_):
        x = next(found)
        return {"bboxes": [[x, 50, x + 40, 150]], "scores": [0.9], "labels": [0], "names": ["person"]}

    torchserve.models["camera"] = {"1.0": FakeModel(dict(IMAGES), alter=alter)}
    return "/predictions/camera?track_session=walk"


def test_boxes_of_images_have_ids_from_the_third_frame_on(start_gateway, torchserve):
    pytest.importorskip("trackers", reason="trackers is not installed")
    path = serve_boxes_of_images(torchserve)
    gateway = start_gateway()
    answers = [gateway.post(f"{path}&track_start={n == 0}", content=PICTURE).json() for n in range(4)]
    assert [answer.get("track_ids", answer) for answer in answers] == [[-1], [-1], [1], [1]]


def test_frames_of_images_without_trackers_are_refused_by_its_name(start_gateway, torchserve, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackers", None)
    path = serve_boxes_of_images(torchserve)
    answer = start_gateway().post(f"{path}&track_start=true", content=PICTURE)
    assert answer.status_code == 500 and answer.json()["error"]["code"] == "missing_package"
    assert "tracks.lock" in answer.json()["error"]["message"]


def test_a_request_without_a_session_has_the_workers_bytes(gateway, cloud):
    gateway.post(START, content=cloud(1))
    assert gateway.post(content=cloud(1)).content == answer_for(cloud(1), {})


def test_headers_name_a_session_too(gateway, cloud):
    headers = {"X-Track-Session": "drive", "X-Track-Start": "1", "X-Frame-Time-S": "12.5"}
    assert gateway.post(content=cloud(1), headers=headers).json()["track_frame"] == 0
    late = gateway.post(content=cloud(1), headers={"X-Track-Session": "drive", "X-Frame-Time-S": "12.5"})
    assert late.status_code == 400 and "12.5" in late.json()["error"]["message"]


def test_a_session_that_is_not_open_is_not_found(gateway, cloud):
    answer = gateway.post(PATH, content=cloud(1))
    assert answer.status_code == 404 and answer.json()["error"]["code"] == "session_not_found"
    assert "track_start" in answer.json()["error"]["message"]


def test_track_start_begins_anew_and_track_end_closes(gateway, cloud):
    gateway.post(START, content=cloud(1))
    gateway.post(PATH, content=cloud(2))
    assert gateway.post(START, content=cloud(1)).json()["track_frame"] == 0
    assert gateway.post(f"{PATH}&track_end=true", content=cloud(1)).json()["track_frame"] == 1
    assert gateway.post(PATH, content=cloud(1)).status_code == 404


def test_sessions_are_of_one_model_and_client(start_gateway, torchserve, cloud):
    torchserve.models["other"] = {"1.0": FakeModel()}
    gateway = start_gateway(api_keys=("one", "two"))
    mine, yours = ({"X-API-Key": key} for key in ("one", "two"))
    assert gateway.post(START, content=cloud(1), headers=mine).status_code == 200
    assert gateway.post(PATH, content=cloud(1), headers=yours).status_code == 404
    assert gateway.post(PATH.replace("second", "other"), content=cloud(1), headers=mine).status_code == 404
    assert gateway.post(PATH, content=cloud(1), headers=mine).status_code == 200


@pytest.mark.parametrize(
    "query",
    [
        "track_session=",
        "track_session=a%20b",
        "track_session=" + "a" * 65,
        "track_session=drive&track_start=yes",
        "track_session=drive&frame_time_s=soon",
        "track_session=drive&frame_time_s=nan",
        "track_session=drive&frame_time_s=2,1",
        "track_session=drive&track_start=true&frame_time_s=1532402927648",
        "track_session=drive&track_start=true&frame_time_s=1532402927647951000",
        "track_start=true",
        "frame_time_s=1",
    ],
)
def test_invalid_options_are_named(gateway, cloud, query):
    answer = gateway.post(f"/predictions/second?{query}", content=cloud(1))
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "unknown_option")


def test_a_misspelt_option_is_answered_with_those_of_tracks_too(gateway, cloud):
    answer = gateway.post("/predictions/second?track_sesion=drive", content=cloud(1))
    known = answer.json()["error"]["message"].partition("known: ")[2].split(", ")
    assert {"track_session", "track_start", "track_end", "frame_time_s", "score_thr"} <= set(known)
    assert answer.json()["error"]["code"] == "unknown_option"


def test_fields_would_leave_out_what_tracks_are_made_of(gateway, cloud):
    answer = gateway.post(f"{START}&fields=names", content=cloud(1))
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "unknown_option")


def test_the_open_inference_protocol_has_no_sessions(gateway, cloud):
    body = {
        "inputs": [
            {
                "name": "frame",
                "datatype": "BYTES",
                "shape": [1],
                "data": [base64.b64encode(cloud(1)).decode()],
            }
        ],
        "parameters": {"track_session": "drive"},
    }
    assert gateway.post("/v2/models/second/infer", json=body).status_code == 400
    del body["parameters"]
    for headers in ({"X-Track-Session": "drive"}, {"X-Frame-Time-S": "1"}):
        assert gateway.post("/v2/models/second/infer", json=body, headers=headers).status_code == 400
    assert gateway.post("/v2/models/second/infer", json=body).status_code == 200


def test_tables_have_the_ids(gateway, cloud):
    gateway.post(START, content=cloud(1))
    answer = gateway.post(PATH, content=cloud(1), headers={"accept": "text/csv"})
    head, *rows = answer.text.splitlines()
    column = head.split(",").index("track_id")
    assert [row.split(",")[column] for row in rows] == [str(k + 1) for k in range(len(rows))] and rows


def many(*clouds: bytes) -> dict[str, object]:
    return {"frames": [{"b64": base64.b64encode(each).decode()} for each in clouds]}


def test_frames_of_one_request_are_followed_in_order(gateway, cloud):
    path = f"{START}&frame_time_s=1,1.1,1.2"
    answers = gateway.post(path, json=many(cloud(1), cloud(1), cloud(2))).json()
    assert [answer["track_frame"] for answer in answers] == [0, 1, 2]
    assert answers[0]["track_ids"] == answers[1]["track_ids"]
    lines = gateway.post(
        f"{PATH}&frame_time_s=1.3,1.4",
        json=many(cloud(1), cloud(2)),
        headers={"accept": "application/x-ndjson"},
    )
    parsed = [json.loads(line) for line in lines.content.splitlines()]
    assert [line["index"] for line in parsed] == [0, 1]
    assert [line["answer"]["track_frame"] for line in parsed] == [3, 4]


def test_a_frame_that_fails_stays_an_error_and_the_next_is_followed(gateway, cloud):
    gateway.post(START, content=cloud(1))
    body = many(cloud(1), cloud(1))
    body["frames"][0]["score_thr"] = 7  # type: ignore[index]
    failed, followed = gateway.post(PATH, json=body).json()
    assert "error" in failed and followed["track_frame"] == 1


def test_times_come_with_every_request_or_none_and_one_per_frame(gateway, cloud):
    assert gateway.post(f"{START}&frame_time_s=5", content=cloud(1)).status_code == 200
    assert gateway.post(PATH, content=cloud(1)).status_code == 400
    assert gateway.post(f"{PATH}&frame_time_s=6,7", content=cloud(1)).status_code == 400
    assert gateway.post(f"{PATH}&frame_time_s=8", content=cloud(1)).status_code == 200
    assert gateway.post(f"{PATH}&frame_time_s=8", content=cloud(1)).status_code == 400


def test_a_request_that_failed_may_be_sent_again_with_its_time():
    sessions = TrackSessions(GatewayOptions())
    start, again, later = (
        TrackRequest("drive", start=k == 0, times_s=(time_s,)) for k, time_s in enumerate((1.0, 1.0, 2.0))
    )
    with pytest.raises(Overloaded), sessions.enter(key(), start):
        raise Overloaded("as in receive_frames")
    with sessions.enter(key(), again) as one:
        with pytest.raises(BadRequest, match="not after 1"):
            sessions.enter(key(), again)  # while it may still be followed
        with pytest.raises(Overloaded), sessions.enter(key(), later):
            raise Overloaded("as in receive_frames")
        with sessions.enter(key(), later):
            assert one.session.last_time_s == 2
    assert one.session.last_time_s == float("-inf")  # nothing was followed


def test_the_client_repeats_a_timed_request_of_a_session(start_gateway, backend, cloud):
    gateway = start_gateway(max_pending_frames=1, max_frames_per_request=1, client_share=1)
    with Client(gateway.url) as client, ThreadPoolExecutor(1) as others:
        options = {"track_session": "drive", "frame_time_s": 1.0}
        client.predict(cloud(1), "second", **{**options, "frame_time_s": 0.5}, track_start=True)
        backend.hold()
        first = others.submit(gateway.post, content=cloud(2))
        eventually(lambda: gateway.admission.items == 1)
        refused = gateway.post(f"{PATH}&frame_time_s=1.0", content=cloud(1))
        assert refused.status_code == 429
        backend.release()
        assert first.result().status_code == 200
        assert client.predict(cloud(1), "second", **options)["track_frame"] == 1


@pytest.fixture
def two_workers(start_gateway, torchserve):
    """A gateway whose second frame is computed while the first is held."""
    torchserve.models["second"]["1.0"] = FakeModel(workers=[4711, 4712])
    return start_gateway()


def test_requests_of_a_session_are_followed_in_the_order_of_their_arrival(
    two_workers, backend, torchserve, cloud
):
    gateway = two_workers
    gateway.post(START, content=cloud(1))
    backend.hold(cloud(2))
    with ThreadPoolExecutor(2) as clients:
        slow = clients.submit(gateway.post, PATH, content=cloud(2))
        eventually(lambda: torchserve.held == 1)
        quick = clients.submit(gateway.post, PATH, content=cloud(3))
        eventually(lambda: len(torchserve.calls) >= 3)  # the second is computed beside the first
        assert not quick.done()
        backend.release()
        assert [slow.result().json()["track_frame"], quick.result().json()["track_frame"]] == [1, 2]


def test_a_request_that_waits_too_long_for_an_earlier_one_gives_up_alone(
    two_workers, backend, torchserve, cloud
):
    gateway = two_workers
    gateway.post(START, content=cloud(1))
    backend.hold(cloud(2))
    with ThreadPoolExecutor(2) as clients:
        slow = clients.submit(gateway.post, PATH, content=cloud(2))
        eventually(lambda: torchserve.held == 1)
        assert gateway.post(f"{PATH}&timeout_ms=300", content=cloud(3)).status_code == 504
        after = clients.submit(gateway.post, PATH, content=cloud(3))
        eventually(lambda: len(torchserve.calls) >= 4)
        assert not after.done()  # the first is still before it
        backend.release()
        assert [slow.result().json()["track_frame"], after.result().json()["track_frame"]] == [1, 2]


def test_a_client_that_leaves_lets_the_next_request_have_its_turn(two_workers, backend, torchserve, cloud):
    gateway = two_workers
    gateway.post(START, content=cloud(1))
    backend.hold(cloud(2))
    with pytest.raises(httpx.ReadTimeout):
        gateway.post(PATH, content=cloud(2), timeout=0.3)
    assert gateway.post(PATH, content=cloud(3)).json()["track_frame"] == 1
    backend.release()


def test_open_sessions_are_bounded_and_visible(start_gateway, cloud):
    gateway = start_gateway(track_sessions=2, client_share=1.0)
    for name in ("a", "b"):
        path = f"/predictions/second?track_session={name}&track_start=true"
        assert gateway.post(path, content=cloud(1)).status_code == 200
    refused = gateway.post("/predictions/second?track_session=c&track_start=true", content=cloud(1))
    assert refused.status_code == 429 and "retry-after" in refused.headers
    assert [model["track_sessions"] for model in gateway.client.get("/models").json()] == [2]
    metrics = gateway.client.get("/metrics").text
    assert "mmdet3d_serve_track_sessions 2.0" in metrics
    assert (
        gateway.post("/predictions/second?track_session=a&track_end=1", content=cloud(1)).status_code == 200
    )
    assert (
        gateway.post("/predictions/second?track_session=c&track_start=1", content=cloud(1)).status_code == 200
    )


def test_no_sessions_are_kept_if_the_server_says_so(start_gateway, cloud):
    answer = start_gateway(track_sessions=0).post(START, content=cloud(1))
    assert answer.status_code == 400 and "track_sessions" in answer.json()["error"]["message"]


def test_one_client_cannot_take_all_sessions(start_gateway, cloud):
    gateway = start_gateway(api_keys=("one", "two"), track_sessions=2, client_share=0.5)
    codes = [
        gateway.post(
            f"/predictions/second?track_session={name}&track_start=1",
            content=cloud(1),
            headers={"X-API-Key": key},
        ).status_code
        for name, key in (("a", "one"), ("b", "one"), ("b", "two"))
    ]
    assert codes == [200, 429, 200]


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def key(session: str = "drive") -> SessionKey:
    return SessionKey("client", "second", "1.0", session)


def test_an_idle_session_expires_and_one_in_use_does_not():
    clock = Clock()
    sessions = TrackSessions(GatewayOptions(track_idle_s=60), clock=clock)
    with sessions.enter(key(), TrackRequest("drive", start=True)):
        clock.now += 1000
        assert len(sessions) == 1
    clock.now += 60
    assert len(sessions) == 1
    clock.now += 0.001
    assert (len(sessions), sessions.expired) == (0, 1)
    with pytest.raises(SessionNotFound):
        sessions.enter(key(), TrackRequest("drive"))


def test_expired_sessions_make_room():
    clock = Clock()
    sessions = TrackSessions(GatewayOptions(track_sessions=1, client_share=1), clock=clock)
    with sessions.enter(key("a"), TrackRequest("a", start=True)):
        pass
    with pytest.raises(Overloaded):
        sessions.enter(key("b"), TrackRequest("b", start=True))
    clock.now += 61
    with sessions.enter(key("b"), TrackRequest("b", start=True)):
        assert sessions.count("second", "1.0") == 1


def test_several_gateway_processes_keep_no_sessions():
    with pytest.raises(BadRequest, match="--gateways 1"):
        TrackSessions(GatewayOptions(), is_only_process=False).enter(key(), TrackRequest("drive", start=True))

"""Handlers as TorchServe calls them: rows in, a body and a status per row out."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import orjson
import pytest

from handlers.mmdet3d_handler import MMDet3DHandler
from handlers.mmdet_handler import MMDetHandler
from serve.errors import ArchiveError
from serve.protocol.batch import FRAMES_CONTENT_TYPE, OUTCOMES_CONTENT_TYPE, pack_frames, unpack_outcomes
from serve.protocol.worker import Batch, EncodedFrame, encode_outcome, read_batch
from tests.worker.context import Context


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def test_every_encoding_of_a_frame_gives_the_same_answer(ask, street):
    body = street.tobytes()
    encoded = base64.b64encode(body).decode()
    json_type = {"Content-Type": "application/json"}
    rows = [
        ({"body": bytearray(body)}, {}),
        ({"data": body}, {"data": {"content-type": "application/octet-stream"}}),
        ({"file": memoryview(body)}, {}),
        ({"body": npy(street)}, {}),
        ({"body": json.dumps({"b64": encoded}).encode()}, json_type),
        ({"body": json.dumps(encoded).encode()}, json_type),
        ({"body": encoded}, {}),
        ({"b64": encoded.encode()}, {}),
        ({"body": {"b64": encoded}}, {}),
        ({"body": body, "model_name": b"second"}, {}),
    ]
    answers = ask(*[row for row, _ in rows], headers=[headers for _, headers in rows])
    assert answers[0][0] == 200 and len(answers[0][1]["bboxes_3d"]) > 2
    assert all(answer == answers[0] for answer in answers)


def test_options_come_as_headers_fields_or_json(ask, street):
    body = street.tobytes()
    document = {"b64": base64.b64encode(body).decode(), "max_detections": 2}
    rows = [
        ({"body": body}, {"X-Max-Detections": "2"}),
        ({"data": body, "max_detections": bytearray(b"2")}, {}),
        ({"body": orjson.dumps(document)}, {"content-type": "application/json"}),
    ]
    for status, answer in ask(*[row for row, _ in rows], headers=[headers for _, headers in rows]):
        assert status == 200 and len(answer["scores_3d"]) == 2


def test_every_row_has_its_own_status(ask, street):
    body = street.tobytes()
    bad = street.copy()
    bad[7, 1] = np.nan
    (alone,) = ask(body)
    answers = ask(body, body[:-3], bad.tobytes(), b"", body, b"some text here!!", body)
    assert [status for status, _ in answers] == [200, 422, 422, 422, 200, 422, 200]
    assert answers[0] == answers[4] == answers[6] == alone
    assert answers[2][1]["error"]["code"] == "non_finite_points"
    assert all(
        answer["error"]["request_id"] == f"id-{i}" for i, (s, answer) in enumerate(answers) if s != 200
    )


def test_framed_batch_has_an_outcome_per_frame(ask, street):
    body = street.tobytes()
    packed = pack_frames([(body, {}), (body[:-1], {}), (body, {"score_thr": 7}), (b"", {"num_points": 0})])
    (row, plain) = ask({"body": packed}, body, headers=[{"content-type": FRAMES_CONTENT_TYPE}])
    status, document = row
    assert status == 200
    assert [outcome["status"] for outcome in document["outcomes"]] == [200, 422, 400, 200]
    assert document["outcomes"][0]["answer"] == plain[1]
    assert document["outcomes"][2]["error"]["code"] == "unknown_option"
    assert document["outcomes"][3]["answer"]["bboxes_3d"] == []


def test_framed_outcomes_contain_the_bodies_of_single_frames(handler, demo_archive, street):
    body = street.tobytes()
    alone = handler.handle([{"body": body}], Context(demo_archive.root))[0]
    headers = {"content-type": FRAMES_CONTENT_TYPE, "accept": OUTCOMES_CONTENT_TYPE}
    context = Context(demo_archive.root, headers=[headers])
    (packed,) = handler.handle([{"body": pack_frames([(body, {}), (body[:-1], {})])}], context)
    outcomes = unpack_outcomes(packed)
    assert context.response_headers[0, "content-type"] == OUTCOMES_CONTENT_TYPE
    assert [status for status, _ in outcomes.items] == [200, 422]
    assert bytes(outcomes.items[0][1]) == alone
    assert outcomes.seconds["inference"] > 0 and outcomes.seconds["decode"] > 0


def test_socket_and_torchserve_give_the_same_answer(handler, demo_archive, street):
    body = street.tobytes()
    packed = pack_frames([(body, {}), (body[:-1], {}), (body, {"max_detections": 1}), (body, {"no": 1})])
    headers = {"content-type": FRAMES_CONTENT_TYPE, "accept": OUTCOMES_CONTENT_TYPE}
    (through,) = handler.handle([{"body": packed}], Context(demo_archive.root, headers=[headers]))
    directly, seconds = handler.answer(Batch(read_batch(packed)))
    assert [encode_outcome(outcome)[0] for outcome in directly] == [200, 422, 200, 400]
    expected = [outcome for outcome in unpack_outcomes(through).items]
    assert [encode_outcome(outcome) for outcome in directly[:3]] == expected[:3]
    assert seconds["inference"] > 0 and seconds["decode"] > 0


def test_watchdog_covers_decoding_and_computing_with_a_limit(handler, street, monkeypatch):
    watched = []

    @contextmanager
    def watchdog(seconds):
        watched.append((seconds, threading.current_thread().name.startswith("engine")))
        yield

    monkeypatch.setattr("serve.worker.handler.watchdog", watchdog)
    frames = [EncodedFrame(street.tobytes())]
    handler.answer(Batch(frames, 7))
    handler.answer(Batch(frames))
    assert watched == [(7, False), (7, True), (0, False), (0, True)]


def test_batches_of_several_threads_are_computed_one_at_a_time(handler, street):
    batch = Batch([EncodedFrame(street.tobytes())])
    expected = encode_outcome(*handler.answer(batch)[0])
    with ThreadPoolExecutor(4) as callers:
        answers = list(callers.map(handler.answer, [batch] * 8))
    assert all(encode_outcome(*outcomes) == expected for outcomes, _ in answers)


def npy_header(text: str) -> bytes:
    """A ``.npy`` of version 1 with this header."""
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode() + bytes(64)


HOSTILE = {
    "a float in the shape": npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': (100, 4.0)}"),
    "a shape that overflows": npy_header(
        "{'descr': '<f4', 'fortran_order': False, 'shape': (9223372036854775807, 4)}"
    ),
    "a negative shape": npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': (-4, 4)}"),
    "objects": npy_header("{'descr': '|O', 'fortran_order': False, 'shape': (4, 4)}"),
    "a type that is none": npy_header(
        "{'descr': [('x', '<f4', (-1,))], 'fortran_order': False, 'shape': (4,)}"
    ),
    "a deep header": npy_header("[" * 5000),
    "a long number": npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': (" + "9" * 5000 + ", 4)}"),
    "pcd without sizes": b"# .PCD v0.7\nFIELDS x y z\nSIZE 4 4\nTYPE F F F\nPOINTS 1e400\nDATA binary\n",
    "ply with endless lists": b"ply\nformat ascii 1.0\nelement vertex 99999999999999999999\nend_header\n",
    "an empty zip": b"PK\x05\x06" + bytes(18),
    "las with a long header": b"LASF" + b"\xff" * 400,
    "no text": b"\xff" * 33,
}


def test_hostile_frames_are_answered_beside_untouched_neighbours(handler, street):
    good = EncodedFrame(street.tobytes())
    frames = [good, *map(EncodedFrame, HOSTILE.values()), EncodedFrame({"\x00": b"", "points": b""}), good]
    outcomes, _ = handler.answer(Batch(frames))
    statuses = [encode_outcome(outcome)[0] for outcome in outcomes]
    assert statuses[0] == statuses[-1] == 200
    wrong = {
        name: status
        for name, status in zip([*HOSTILE, "parts"], statuses[1:-1], strict=True)
        if status // 100 != 4
    }
    assert not wrong
    assert (
        encode_outcome(outcomes[0])
        == encode_outcome(outcomes[-1])
        == encode_outcome(*handler.answer(Batch([good]))[0])
    )


def test_handler_describes_its_archive(handler, demo_archive):
    context = Context(demo_archive.root, headers=[{"describe": "True"}])
    (body,) = handler.handle([{}], context)
    description = orjson.loads(body)
    assert (description["name"], description["modality"], description["load_dim"]) == ("second", "lidar", 4)
    assert description["self_test"]["passed"] and description["classes"] == ["Pedestrian", "Cyclist", "Car"]


@pytest.mark.parametrize(
    ("row", "headers", "code"),
    [
        ({}, {}, "bad_request"),
        ({"body": b"x", "data": b"y"}, {}, "bad_request"),
        ({"body": b"{", "_": b""}, {"content-type": "application/json"}, "unknown_option"),
        ({"body": b"{"}, {"content-type": "application/json"}, "bad_request"),
        ({"body": {"points": [1, 2]}}, {}, "bad_request"),
        ({"body": b"abc"}, {"Content-Type": "multipart/form-data"}, "bad_request"),
        ({"body": b"abc"}, {"Content-Encoding": "gzip"}, "bad_request"),
        ({"body": b"abc"}, {"X-Score-Thr": "none"}, "unknown_option"),
        ({"body": b"abc", "threshold": b"0.5"}, {}, "unknown_option"),
        ({"body": b"abc", "score_thr": b"\xff"}, {}, "bad_request"),
        ({"body": b"abc"}, {"content-type": FRAMES_CONTENT_TYPE}, "bad_request"),
    ],
)
def test_invalid_request_returns_400_with_its_code(ask, row, headers, code):
    ((status, document),) = ask(row, headers=[headers])
    assert status == 400 and document["error"]["code"] == code and document["error"]["message"]


def test_archive_of_the_other_package_is_rejected(demo_archive):
    with pytest.raises(ArchiveError, match="lidar"):
        MMDetHandler().initialize(Context(demo_archive.root))


def test_altered_archive_is_rejected_with_the_file_named(demo_archive, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(demo_archive.root, copy)
    weights = bytearray((copy / "weights.safetensors").read_bytes())
    weights[-5] ^= 1
    (copy / "weights.safetensors").write_bytes(weights)
    with pytest.raises(ArchiveError, match=r"weights\.safetensors"):
        MMDet3DHandler().initialize(Context(copy))


def test_invalid_setting_stops_the_worker_and_is_named(demo_archive, monkeypatch):
    from serve.errors import SettingsError

    monkeypatch.setenv("MMDET3D_SERVE_MAX_POINTZ", "5")
    with pytest.raises(SettingsError, match="MAX_POINTS"):
        MMDet3DHandler().initialize(Context(demo_archive.root))


@pytest.mark.parametrize(
    ("module", "program"),
    [
        ("cv2", "import handlers.mmdet3d_handler"),
        (
            "torch",
            "import handlers.mmdet3d_handler as h; from tests.worker.context import Context; "
            "h.MMDet3DHandler().initialize(Context('nowhere'))",
        ),
    ],
)
def test_worker_that_cannot_import_names_the_module(module, program):
    """TorchServe replaces an `ImportError` of a handler by one about a handler of its own."""
    program = f"import sys; sys.modules[{module!r}] = None; {program}"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert f"serve.errors.SetupError: the worker cannot import {module}: " in ended.stderr, ended.stderr

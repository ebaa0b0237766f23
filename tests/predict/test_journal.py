"""What a run recorded counts for the next one, and nothing else does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest

from serve.errors import BadRequest, UndecodableFrame, error_body
from serve.predict.frames import Clip, Frame, Prediction
from serve.predict.journal import Journal

RUN: dict[str, Any] = {"model": "second", "options": {"score_thr": 0.5}}
CLIP = Clip("clip")


def frame(name: str, etag: str = "1") -> Frame:
    return Frame(name, name, CLIP, lambda: b"", etag=etag)


def prediction(name: str, etag: str = "1", score: float = 0.5) -> Prediction:
    answer = {"scores": [score], "small": 0.0000036159506}
    # A server writes small float32 numbers in another way than Python's JSON would.
    return Prediction(frame(name, etag), b'{"scores":[%g],"small":0.0000036159506}' % score, answer)


def failure(name: str) -> Prediction:
    error = UndecodableFrame("torn")
    return Prediction(frame(name), orjson.dumps(error_body(error)), None, error)


def journal(folder: Path, **changes: Any) -> Journal:
    return Journal(folder, {**RUN, **changes}, {"threshold": 0.3})


def recorded(folder: Path) -> list[str]:
    return [orjson.loads(line)["frame"] for line in (folder / "predictions.jsonl").read_bytes().splitlines()]


def test_a_stopped_run_goes_on_with_the_same_bytes(tmp_path: Path) -> None:
    with journal(tmp_path) as first:
        first.append(prediction("a"))
        first.append(prediction('b "quoted", answer'))
    assert not (tmp_path / "predictions.jsonl").exists()
    with journal(tmp_path) as second:
        assert len(second) == 2
        found = second.find(frame('b "quoted", answer'))
        assert found is not None and not found.is_new
        assert found.encoded == prediction("b").encoded
        assert found.answer == prediction("b").answer
        assert second.find(frame("c")) is None
        assert second.find(frame("a"))
        second.append(prediction("c"))
        second.finish()
    assert recorded(tmp_path) == ["a", 'b "quoted", answer', "c"]


def test_a_line_that_a_kill_cut_short_does_not_count(tmp_path: Path) -> None:
    with journal(tmp_path) as first:
        first.append(prediction("a"))
    part = tmp_path / ".predictions.jsonl.part"
    part.write_bytes(part.read_bytes() + b'{"frame":"b","etag":"1","answer":{"sco')
    with journal(tmp_path) as second:
        assert second.find(frame("a")) and second.find(frame("b")) is None
        second.append(prediction("b"))
        second.finish()
    assert recorded(tmp_path) == ["a", "b"]


def test_failed_and_changed_frames_are_tried_again_and_have_one_line_in_the_end(tmp_path: Path) -> None:
    with journal(tmp_path) as first:
        for each in (prediction("a"), failure("b"), prediction("c"), prediction("d")):
            first.append(each)
        first.finish()
    with journal(tmp_path) as second:
        assert second.find(frame("a"))
        assert second.find(frame("b")) is None
        assert second.find(frame("c", etag="2")) is None
        second.append(prediction("b"))
        second.append(prediction("c", etag="2", score=0.75))
        assert [line["frame"] for line in second.lines()] == [
            "a",
            "b",
            "c",
        ]  # d is not in the source any more
        second.finish()
    assert recorded(tmp_path) == ["a", "b", "c"]
    assert b'"scores":[0.75]' in (tmp_path / "predictions.jsonl").read_bytes()


def test_predictions_of_another_run_are_not_mixed_in(tmp_path: Path) -> None:
    with journal(tmp_path) as first:
        first.append(prediction("a"))
        first.finish()
    with pytest.raises(BadRequest, match=r"model 'second', now 'other'.*--overwrite"):
        journal(tmp_path, model="other")
    assert recorded(tmp_path) == ["a"]
    with Journal(tmp_path, {**RUN, "model": "other"}, {}, overwrite=True) as second:
        assert len(second) == 0


def test_a_record_of_unknown_origin_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "predictions.jsonl").write_text("mine\n")
    with pytest.raises(BadRequest):
        journal(tmp_path)
    assert (tmp_path / "predictions.jsonl").read_text() == "mine\n"


def test_other_outputs_of_the_same_predictions_are_noticed(tmp_path: Path) -> None:
    with journal(tmp_path) as first:
        assert first.same_outputs
        first.append(prediction("a"))
    with Journal(tmp_path, RUN, {"threshold": 0.6}) as second:
        assert not second.same_outputs
        assert second.find(frame("a"))


def test_two_runs_at_a_time_in_one_folder_are_refused(tmp_path: Path) -> None:
    with journal(tmp_path) as first:
        first.append(prediction("a"))
        with pytest.raises(BadRequest, match="another run"):
            journal(tmp_path)
        first.append(prediction("b"))
        first.finish()
    assert recorded(tmp_path) == ["a", "b"]

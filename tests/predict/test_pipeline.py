"""Frames come out in order, batches are consecutive frames, memory is bounded, and one bad frame fails alone."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from serve.errors import NotReady, UndecodableFrame
from serve.predict import AsyncPredictor, FrameOptions, predict_frames
from serve.predict.frames import Clip, Frame, Prediction, encode_pixels
from serve.protocol.batching import BatchRule
from tests.gateway.running import eventually
from tests.predict.fake_model import EchoModel

CLIP = Clip("clip")


@pytest.fixture
def model() -> Iterator[EchoModel]:
    made = EchoModel()
    yield made
    made.close()


def frame(number: int, body: bytes | None = None) -> Frame:
    content = b"frame %d" % number if body is None else body
    return Frame(f"{number}", f"{number}", CLIP, lambda: content)


def hash_of(number: int) -> str:
    return hashlib.sha256(b"frame %d" % number).hexdigest()


@pytest.mark.parametrize("batch_size", [1, 3])
def test_predictions_come_in_the_order_of_the_frames(model: EchoModel, batch_size: int) -> None:
    found = list(predict_frames(map(frame, range(10)), model, FrameOptions(), batch_size=batch_size))
    assert [each.answer["hash"] for each in found if each.answer] == [hash_of(k) for k in range(10)]
    assert model.batches == {1: [1] * 10, 3: [3, 3, 3, 1]}[batch_size]


def test_images_of_one_size_share_batches_and_others_wait_for_theirs(model: EchoModel) -> None:
    model.description = {"modality": "image"}
    bodies = [encode_pixels(np.full((4, 4 + 4 * (k % 2), 3), k, np.uint8)) for k in range(14)]
    rule = BatchRule.of(model.description, frames=3)
    found = list(predict_frames(map(frame, range(14), bodies), model, FrameOptions(), rule=rule))
    assert [each.frame.name for each in found] == [f"{k}" for k in range(14)]
    assert [each.answer["hash"] for each in found if each.answer] == [
        hashlib.sha256(body).hexdigest() for body in bodies
    ]
    assert model.batches == [3, 3, 3, 3, 1, 1]


def test_a_rare_size_does_not_wait_longer_than_two_batches(model: EchoModel) -> None:
    model.description = {"modality": "image"}
    bodies = [encode_pixels(np.full((4, 8 if k == 1 else 4, 3), k, np.uint8)) for k in range(14)]
    rule = BatchRule.of(model.description, frames=3)
    list(predict_frames(map(frame, range(14), bodies), model, FrameOptions(), rule=rule))
    assert model.batches == [3, 3, 1, 3, 3, 1]


def test_a_batch_of_clouds_ends_at_its_cost(model: EchoModel) -> None:
    model.description = {"modality": "lidar", "load_dim": 4}
    points = [4, 4, 4, 9, 30, 1, 1, 1, 1]  # of at most 10 and 4 frames
    bodies = [bytes([k]) * 16 * count for k, count in enumerate(points)]
    rule = BatchRule.of(model.description, frames=4, points=10)
    found = list(predict_frames(map(frame, range(9), bodies), model, FrameOptions(), rule=rule))
    assert [each.frame.name for each in found] == [f"{k}" for k in range(9)]
    assert model.batches == [2, 1, 1, 1, 4]


def test_a_frame_without_a_cost_fails_outside_of_the_batches(model: EchoModel) -> None:
    model.description = {"modality": "image"}
    body = encode_pixels(np.zeros((4, 4, 3), np.uint8))
    bodies = [body, b"no image", body]
    found = list(
        predict_frames(
            map(frame, range(3), bodies),
            model,
            FrameOptions(),
            rule=BatchRule.of(model.description, frames=2),
        )
    )
    assert [type(each.error) for each in found] == [type(None), UndecodableFrame, type(None)]
    assert model.batches == [2]


def test_an_endless_source_is_read_only_as_far_as_the_bound(model: EchoModel) -> None:
    model.gate.clear()
    read = 0

    def endless() -> Iterator[Frame]:
        nonlocal read
        for k in itertools.count():
            read += 1
            yield frame(k)

    predictions = predict_frames(endless(), model, FrameOptions(), batch_size=2, ahead=3)
    model.gate.set()
    assert [next(predictions).frame.name for _ in range(4)] == ["0", "1", "2", "3"]
    eventually(lambda: read == 2 * 2 + 3 + 3)  # one more for each that was taken and let go of
    predictions.close()
    assert read == 2 * 2 + 3 + 3


def test_a_frame_that_cannot_be_read_or_decoded_fails_alone(model: EchoModel) -> None:
    def unreadable() -> bytes:
        raise OSError("disk gone")

    frames = [frame(0), frame(1, b"bad"), Frame("2", "2", CLIP, unreadable), frame(3)]
    found = list(predict_frames(frames, model, FrameOptions(), batch_size=4))
    assert [type(each.error) for each in found] == [
        type(None),
        UndecodableFrame,
        UndecodableFrame,
        type(None),
    ]
    assert b'"code":"undecodable_frame"' in found[1].encoded


def test_what_concerns_every_frame_ends_the_run(model: EchoModel) -> None:
    predictions = predict_frames([frame(0), frame(1, b"gone"), frame(2)], model, FrameOptions())
    assert next(predictions).answer
    with pytest.raises(NotReady):
        next(predictions)


def test_an_error_of_the_source_comes_after_the_frames_before_it(model: EchoModel) -> None:
    def broken() -> Iterator[Frame]:
        yield frame(0)
        raise UndecodableFrame("the video ends here")

    predictions = predict_frames(broken(), model, FrameOptions())
    assert next(predictions).answer
    with pytest.raises(UndecodableFrame):
        next(predictions)


def test_finished_frames_keep_their_place_and_are_not_predicted(model: EchoModel) -> None:
    done = {"1", "2", "4", "5", "6", "7"}

    def finished(each: Frame) -> Prediction | None:
        return Prediction(each, b"{}", {}, is_new=False) if each.name in done else None

    found = predict_frames(map(frame, range(9)), model, FrameOptions(), batch_size=2, finished=finished)
    assert [(each.frame.name, each.is_new) for each in found] == [
        (f"{k}", f"{k}" not in done) for k in range(9)
    ]
    assert model.prepared == 3


def test_concurrent_tasks_share_batches_without_a_timer(model: EchoModel) -> None:
    async def ask() -> list[str]:
        async with AsyncPredictor(model, max_batch=4, max_pending=8) as predictor:
            model.gate.clear()
            tasks = [asyncio.create_task(predictor.predict(b"frame %d" % k)) for k in range(12)]
            while model.prepared < 8:  # the bound
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.02)
            assert model.prepared == 8
            model.gate.set()
            return [(await task)["hash"] for task in tasks]

    assert asyncio.run(ask()) == [hash_of(k) for k in range(12)]
    assert model.batches[0] == 1  # went alone: nothing else was decoded
    assert max(model.batches) == 4
    assert sum(model.batches) == 12


def test_a_task_that_is_cancelled_frees_its_place_and_its_frame_is_dropped(model: EchoModel) -> None:
    async def ask() -> None:
        async with AsyncPredictor(model, max_batch=4, max_pending=3) as predictor:
            model.gate.clear()
            first = asyncio.create_task(predictor.predict(b"frame 0"))
            await asyncio.sleep(0.02)
            others = [asyncio.create_task(predictor.predict(b"frame %d" % k)) for k in (1, 2)]
            while model.prepared < 3:
                await asyncio.sleep(0.001)
            others[0].cancel()
            late = asyncio.create_task(predictor.predict(b"frame 3"))
            while model.prepared < 4:
                await asyncio.sleep(0.001)
            model.gate.set()
            assert (await first)["hash"] == hash_of(0)
            assert (await others[1])["hash"] == hash_of(2)
            assert (await late)["hash"] == hash_of(3)

    asyncio.run(ask())
    assert sum(model.batches) == 3


def test_a_bad_frame_of_a_task_fails_that_task_only(model: EchoModel) -> None:
    async def ask() -> list[Any]:
        async with AsyncPredictor(model) as predictor:
            tasks = [predictor.predict(body) for body in (b"frame 0", b"bad", b"frame 2")]
            return await asyncio.gather(*tasks, return_exceptions=True)

    found = asyncio.run(ask())
    assert [type(each) for each in found] == [dict, UndecodableFrame, dict]

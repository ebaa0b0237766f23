"""Variants of a served network differ by rounding in all of its layers, and leave it as it was."""

from __future__ import annotations

from typing import Any

import orjson
import torch

from serve.compare.detections import compare
from serve.protocol.frames import Frame
from serve.protocol.json_bodies import encode_json
from serve.protocol.options import FrameOptions
from serve.runtime.rounding import VARIANTS, _weights, changed_weights, variants


def detections(detector, street) -> dict[str, Any]:
    (answer,) = detector.run([Frame(street, FrameOptions())])
    return orjson.loads(encode_json(answer))


def test_variants_are_equal_within_rounding_and_leave_the_network_unchanged(detector, street):
    before = detections(detector, street)
    answers = list(variants(detector.network, lambda: detections(detector, street)))
    assert len(answers) == VARIANTS
    for answer in answers:
        assert answer["scores_3d"] != before["scores_3d"] and compare(before, answer).ok
    assert detections(detector, street) == before


def test_every_weight_of_a_fused_network_is_changed_and_restored(demo_archive, detector):
    from safetensors.torch import load_file

    weights = list(_weights(detector.network))
    kernels = [tensor for tensor in load_file(demo_archive.weights).values() if tensor.dim() > 1]
    assert sum(weight.dim() > 1 or weight.numel() > 1 for weight in weights) >= len(kernels)
    former = [weight.detach().clone() for weight in weights]
    with changed_weights(detector.network, 1):
        for weight, value in zip(weights, former, strict=True):
            if value.any():
                assert not torch.equal(weight, value)
                largest = float((weight.detach() - value).abs().max() / value.abs().max())
                assert 0 < largest < 1e-5
    assert all(torch.equal(weight, value) for weight, value in zip(weights, former, strict=True))


def test_a_variant_is_reproducible_and_unlike_the_others(detector, street):
    def run(variant: int) -> Any:
        with changed_weights(detector.network, variant):
            return detections(detector, street)

    assert run(1) == run(1) != run(3)
    assert run(0) == detections(detector, street)

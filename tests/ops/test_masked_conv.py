"""Convolutions with a mask against torch's in double precision, and against themselves without one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.ops.cpu import masked_conv
from serve.ops.cpu.gemm import CHANNELS, LANES

# (kernel, stride, padding, transposed, inputs, outputs) by kind
LAYERS = {
    "winograd": (3, 1, 1, False, LANES, 2 * CHANNELS),
    "winograd, one panel": (3, 1, 1, False, 2 * LANES, CHANNELS),
    "winograd, part of a vector": (3, 1, 1, False, LANES, CHANNELS + 5),
    "winograd, 2 x 2": (3, 1, 1, False, LANES, 2 * CHANNELS),
    "winograd, 2 x 2, part of a vector": (3, 1, 1, False, LANES, CHANNELS + 5),
    "direct, stride": (3, 2, 1, False, 10, 2 * CHANNELS),
    "direct, odd channels": (3, 1, 0, False, 5, 9),
    "direct, kernel of the stride": (2, 2, 0, False, 7, 33),
    "narrow": (3, 1, 1, False, 6, 1),
    "narrow, no padding": (3, 1, 0, False, LANES, 1),
    "cellwise": (1, 1, 0, False, 10, 18),
    "cellwise, stride over cells": (1, 2, 0, False, 6, 4),
    "cellwise, several depths": (1, 1, 0, False, 600, 2 * CHANNELS + 3),
    "cellwise, transposed": (2, 2, 0, True, 10, 20),
    "cellwise, transposed by 1": (1, 1, 0, True, 10, CHANNELS),
    "cellwise, transposed by 4": (4, 4, 0, True, 3, 5),
}


def pack(name: str, seed: int, *, relu: bool = False) -> tuple[masked_conv.ConvLayer, Any]:
    """Return a packed layer and the same convolution in double precision."""
    kernel, stride, padding, transposed, inputs, outputs = LAYERS[name]
    generator = torch.Generator().manual_seed(seed)
    shape = (inputs, outputs) if transposed else (outputs, inputs)
    weight = torch.randn(*shape, kernel, kernel, generator=generator) / (kernel * inputs**0.5)
    bias = torch.randn(outputs, generator=generator)
    layer = masked_conv.pack_layer(
        weight, bias, stride=stride, padding=padding, relu=relu, transposed=transposed,
        tile=2 if "2 x 2" in name else 4,
    )  # fmt: skip
    assert layer.kind == name.split(",")[0]

    def reference(x: np.ndarray) -> np.ndarray:
        maps = torch.from_numpy(x).permute(0, 3, 1, 2).double()
        if transposed:
            out = torch.nn.functional.conv_transpose2d(maps, weight.double(), bias.double(), stride=stride)
        else:
            out = torch.nn.functional.conv2d(maps, weight.double(), bias.double(), stride, padding)
        return (out.relu() if relu else out).permute(0, 2, 3, 1).float().numpy()

    return layer, reference


def empty_out(layer: masked_conv.ConvLayer, x: np.ndarray, room: int = 0) -> np.ndarray:
    shape = (len(x), *layer.out_shape(*x.shape[1:3]), layer.outputs + room)
    return np.full(shape, np.nan, np.float32)


@pytest.mark.parametrize("name", LAYERS)
@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    batch=st.integers(1, 3),
    height=st.integers(3, 11),
    width=st.sampled_from([3, 4, 8, 97, 100]),  # more than one block of tiles too
    relu=st.booleans(),
)
def test_convolution_equals_torchs_at_every_size(name, seed, batch, height, width, relu):
    layer, reference = pack(name, seed, relu=relu)
    x = (
        np.random.default_rng(seed)
        .standard_normal((batch, height, width, LAYERS[name][4]))
        .astype(np.float32)
    )
    out = empty_out(layer, x)
    masked_conv.convolve(x, layer, out)
    np.testing.assert_allclose(out, reference(x), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    batch=st.integers(1, 3),
    height=st.integers(3, 11),
    width=st.sampled_from([3, 8, 60]),
    share=st.sampled_from([0.0, 0.02, 0.2, 1.0]),
)
def test_masked_convolution_has_the_bits_of_the_full_one(name, seed, batch, height, width, share):
    layer, _ = pack(name, seed)
    rng = np.random.default_rng(seed)
    inputs = LAYERS[name][4]
    # A background that is not constant, as behind the first layers.
    base = rng.integers(0, 3, (height, width, inputs)).astype(np.float32)
    before = masked_conv.compress(base)
    empty = empty_out(layer, base[None], room=3)
    masked_conv.convolve(base[None], layer, empty, 2)
    after = masked_conv.compress(empty[0])
    mask = rng.random((batch, height, width)) < share
    x = np.where(
        mask[..., None], rng.standard_normal((batch, height, width, inputs)).astype(np.float32), base
    )
    full = empty_out(layer, x, room=3)
    masked_conv.convolve(x, layer, full, 2)

    changed = masked_conv.find_changed(x, before)
    assert (changed == mask).all()
    x[~changed] = np.nan  # nothing may be read there
    part = empty_out(layer, x, room=3)
    marks = masked_conv.convolve(x, layer, part, 2, changed=changed, before=before, after=after)
    masked_conv.fill(part, marks, after, 2, layer.outputs)
    assert part.tobytes() == full.tobytes()
    assert not marks[(full == empty).all(-1) | np.isnan(full[..., 2])].any()


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("masked", [False, True])
def test_wanted_cells_have_the_bits_of_the_full_convolution_and_read_no_others(name, masked):
    layer, _ = pack(name, 11)
    rng = np.random.default_rng(11)
    x = rng.standard_normal((2, 12, 17, LAYERS[name][4])).astype(np.float32)
    before = masked_conv.compress(np.zeros_like(x[0]))
    full = empty_out(layer, x)
    masked_conv.convolve(before.expand()[None], layer, full[:1])
    after = masked_conv.compress(full[0])
    x[rng.random(x.shape[:3]) < 0.5] = 0
    masked_conv.convolve(x, layer, full)
    wanted = rng.random(full.shape[:3]) < 0.05
    changed = masked_conv.find_changed(x, before) if masked else None
    read = masked_conv.inputs_of(layer, wanted, *x.shape[1:3])
    assert 0 < read.mean() < 1
    x[~read] = np.nan
    part = empty_out(layer, x)
    marks = masked_conv.convolve(x, layer, part, changed=changed, before=before, after=after, wanted=wanted)
    if masked:
        masked_conv.fill(part, marks, after, 0, layer.outputs)
    assert part[wanted].tobytes() == full[wanted].tobytes()


def test_batch_and_threads_do_not_change_an_images_bits():
    layer, _ = pack("winograd", 3)
    x = np.random.default_rng(3).standard_normal((4, 13, 30, LANES)).astype(np.float32)
    together = empty_out(layer, x)
    masked_conv.convolve(x, layer, together)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for k in range(4):
                alone = empty_out(layer, x[k : k + 1])
                masked_conv.convolve(x[k : k + 1], layer, alone)
                assert alone.tobytes() == together[k].tobytes()
    finally:
        torch.set_num_threads(before)


def test_relu_keeps_nan():
    for name in LAYERS:
        layer, _ = pack(name, 5, relu=True)
        x = np.zeros((1, 6, 6, LAYERS[name][4]), np.float32)
        x[0, 2, 2, 0] = np.nan
        out = np.zeros_like(empty_out(layer, x))
        masked_conv.convolve(x, layer, out)
        assert np.isnan(out).any(), name


def test_background_is_kept_as_its_distinct_cells():
    cells = np.zeros((4, 5, 3), np.float32)
    cells[0] = 1
    cells[1, 1] = -0.0
    known = masked_conv.compress(cells)
    assert len(known.rows) == 3  # negative zero has bits of its own
    assert known.expand().tobytes() == cells.tobytes()


def test_errors_name_the_wrong_argument():
    with pytest.raises(ValueError, match="weight must be"):
        masked_conv.pack_layer(torch.zeros(4, 4, 3, 1), None, stride=1, padding=1, relu=False)
    with pytest.raises(ValueError, match="transposed kernel"):
        masked_conv.pack_layer(
            torch.zeros(4, 4, 3, 3), None, stride=2, padding=0, relu=False, transposed=True
        )


@pytest.mark.parametrize("name", [name for name in LAYERS if not name.startswith("narrow")])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("scale", [1, 2])
def test_an_addend_is_added_before_the_relu(name, relu, scale):
    layer, _ = pack(name, 7, relu=relu)
    _, reference = pack(name, 7)
    rng = np.random.default_rng(7)
    x = rng.standard_normal((2, 14, 27, LAYERS[name][4])).astype(np.float32)
    out = empty_out(layer, x, room=2)
    height, width = out.shape[1:3]
    rows, columns = (np.arange(size) * -(-size // scale) // size for size in (height, width))
    added = rng.standard_normal((2, rows[-1] + 1, columns[-1] + 1, layer.outputs)).astype(np.float32)
    masked_conv.convolve(x, layer, out, 1, addend=added)
    expected = reference(x) + added[:, rows][:, :, columns]
    np.testing.assert_allclose(
        out[..., 1:-1], np.maximum(expected, 0) if relu else expected, atol=2e-5, rtol=1e-5
    )
    assert np.isnan(out[..., 0]).all() and np.isnan(out[..., -1]).all()


def test_an_addend_is_refused_where_it_would_be_ignored():
    layer, _ = pack("narrow", 1)
    x = np.zeros((1, 4, 4, 6), np.float32)
    addend = np.zeros((1, 4, 4, 1), np.float32)
    with pytest.raises(ValueError, match="narrow"):
        masked_conv.convolve(x, layer, empty_out(layer, x), addend=addend)

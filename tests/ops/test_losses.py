"""Focal losses and synchronized batch normalization against torch, values and gradients, through mmcv."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.ops import losses, sync_bn


def sigmoid_loss(logits, target, gamma, alpha):
    hot = torch.nn.functional.one_hot(target, logits.shape[1] + 1)[:, :-1].to(logits.dtype)
    p = logits.sigmoid()
    right = p * hot + (1 - p) * (1 - hot)
    factor = alpha * hot + (1 - alpha) * (1 - hot)
    return -factor * (1 - right) ** gamma * right.log()


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    n=st.integers(0, 6),
    classes=st.integers(1, 4),
    gamma=st.sampled_from([2.0, 1.5]),
    weighted=st.booleans(),
)
def test_focal_losses_and_gradients_follow_their_definition(mmcv_ops, seed, n, classes, gamma, weighted):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, classes, generator=generator, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, classes + (not weighted), (n,), generator=generator)
    weight = torch.rand(classes, generator=generator).double() if weighted else None
    factor = 1.0 if weight is None else weight[target]
    expected = (sigmoid_loss(logits, target, gamma, 0.25).sum(1) * factor).sum()
    got = mmcv_ops.sigmoid_focal_loss(logits, target, gamma, 0.25, weight, "sum")
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got, logits)[0], torch.autograd.grad(expected, logits)[0])
    if n == 0:
        return
    target = target.clamp(max=classes - 1)
    p = logits.softmax(1).gather(1, target[:, None])[:, 0]
    factor = 1.0 if weight is None else weight[target]
    expected = (-0.25 * (1 - p) ** gamma * p.log() * factor).sum()
    got = mmcv_ops.softmax_focal_loss(logits, target, gamma, 0.25, weight, "sum")
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got, logits)[0], torch.autograd.grad(expected, logits)[0])


def test_focal_losses_stay_finite_for_large_logits_and_float16():
    logits = torch.tensor([[1e4, -1e4], [-1e4, 1e4]])
    target = torch.tensor([0, 2])
    for dtype in (torch.float32, torch.float16):
        out = torch.zeros(2, 2, dtype=dtype)
        losses.sigmoid_focal_loss_forward(logits.to(dtype), target, torch.zeros(0), out, 2.0, 0.25)
        assert torch.isfinite(out).all() and out[0].abs().max() < 1e-6 < out[1, 1]


def test_softmax_focal_loss_ignores_negative_targets():
    p = torch.tensor([[0.2, 0.8], [0.5, 0.5]])
    out = torch.ones(2)
    losses.softmax_focal_loss_forward(p, torch.tensor([-1, 1]), torch.ones(2), out, 2.0, 0.25)
    assert out[0] == 0 and out[1] > 0


@pytest.mark.parametrize(
    ("error", "name", "change"),
    [
        (IndexError, "target", {"target": torch.tensor([0, 9])}),
        (IndexError, "target", {"target": torch.tensor([0, 3]), "weight": torch.ones(3)}),
        (ValueError, "target", {"target": torch.tensor([0.0, 1])}),
        (ValueError, "weight", {"weight": torch.ones(2)}),
        (ValueError, "output", {"output": torch.zeros(2)}),
        (ValueError, "input", {"input": torch.zeros(2)}),
        (TypeError, "input", {"input": torch.zeros(2, 3).long()}),
    ],
)
def test_errors_name_the_wrong_argument(error, name, change):
    args = {
        "input": torch.zeros(2, 3),
        "target": torch.tensor([0, 1]),
        "weight": torch.zeros(0),
        "output": torch.zeros(2, 3),
        **change,
    }
    with pytest.raises(error, match=name):
        losses.sigmoid_focal_loss_forward(**args, gamma=2.0, alpha=0.25)


@pytest.mark.parametrize("mode", ["default", "N"])
def test_sync_bn_of_one_process_equals_batch_norm(mmcv_ops, mode, monkeypatch):
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 1)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, 5, 6, generator=generator)
    upstream = torch.randn(x.shape, generator=generator)
    plain = torch.nn.BatchNorm2d(3)
    layers, results = (plain, mmcv_ops.SyncBatchNorm(3, group=0, stats_mode=mode)), []
    for layer in layers:
        with torch.no_grad():
            layer.weight.copy_(torch.tensor([0.5, 1.5, -1.0]))
            layer.bias.copy_(torch.tensor([0.1, 0.2, 0.3]))
        leaf = x.clone().requires_grad_()
        out = layer(leaf)
        out.backward(upstream)
        results.append(
            (out, leaf.grad, layer.weight.grad, layer.bias.grad, layer.running_mean, layer.running_var)
        )
    for got, expected in zip(*reversed(results), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_sync_bn_names_statistics_of_wrong_length():
    with pytest.raises(ValueError, match="mean"):
        sync_bn.sync_bn_forward_mean(torch.zeros(2, 3, 4), torch.zeros(2))

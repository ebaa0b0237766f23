"""CUDA graphs on the stand-in, which records operators and replays them on the same memory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from serve.runtime.accelerator import graphs
from serve.runtime.accelerator.graphs import CALLS_BEFORE, GraphCache
from serve.runtime.accelerator.stand_in import DEVICE, StandInDevice, stand_in_device

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


@pytest.fixture
def device() -> Iterator[StandInDevice]:
    with stand_in_device() as made, torch.no_grad():
        yield made


def layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(3, 2, 3)).eval()


def image(seed: int, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, 2, 6, 5, generator=torch.Generator().manual_seed(seed))


def warm(call, *arguments) -> None:
    for _ in range(CALLS_BEFORE):
        call(*arguments)


def test_replay_answers_a_new_input_as_a_call_does_and_is_one_launch(device):
    network = layers()
    expected = [network(image(seed)) for seed in range(4)]
    network.to(DEVICE)
    cache = GraphCache()
    call = cache.wrap(network)
    for seed in range(CALLS_BEFORE):
        assert torch.equal(call(image(seed).to(DEVICE)).cpu(), expected[seed])
    assert len(cache) == 1 and cache.replays == 0
    for seed in (3, 0, 2):
        there = image(seed).to(DEVICE)
        device.reset()
        result = call(there)
        assert device.counts.operators == {"copy_": 1, "graph": 1}
        assert torch.equal(result.cpu(), expected[seed])
    assert cache.replays == 3 and cache.disabled is None


def test_each_size_of_batch_has_a_recording_and_the_oldest_goes(device, monkeypatch):
    monkeypatch.setattr(graphs, "MAX_RECORDINGS", 2)
    network = layers().to(DEVICE)
    cache = GraphCache()
    call = cache.wrap(network)
    for batch in (1, 2, 3):
        warm(call, image(0, batch).to(DEVICE))
    assert len(cache) == 2
    device.reset()
    call(image(1, 3).to(DEVICE))
    assert device.counts.operators["graph"] == 1
    device.reset()
    call(image(1, 1).to(DEVICE))
    assert device.counts.operators["graph"] == 0


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * x.sum().item(),
        lambda x: x[x > 0].sum() + x,
        lambda x: x + torch.ones(5).to(DEVICE),
    ],
    ids=["number", "size", "upload"],
)
def test_what_waits_or_uploads_runs_as_before(function, device):
    cache = GraphCache()
    call = cache.wrap(function)
    for seed in range(CALLS_BEFORE + 2):
        assert torch.equal(call(image(seed).to(DEVICE)).cpu(), function(image(seed).to(DEVICE)).cpu())
    assert len(cache) == 0 and cache.replays == 0 and cache.disabled is not None


def test_recording_that_gives_another_result_is_not_used(device):
    calls = []

    def drift(x):
        calls.append(0)
        return x + float(len(calls))

    cache = GraphCache()
    warm(cache.wrap(drift), image(0).to(DEVICE))
    assert len(cache) == 0 and cache.disabled is not None


def test_nested_results_keep_their_structure_and_gradients_are_not_recorded(device):
    network = layers().to(DEVICE)
    cache = GraphCache()

    def multi(maps):
        return [one * 2 for one in maps], (network(maps[0]), None)

    call = cache.wrap(lambda maps: multi(maps)[0])
    warm(call, (image(0).to(DEVICE), image(1, 2).to(DEVICE)))
    found = call((image(2).to(DEVICE), image(3, 2).to(DEVICE)))
    assert isinstance(found, list) and torch.equal(found[1].cpu(), image(3, 2) * 2) and cache.replays == 1
    with torch.enable_grad():
        call((image(2).to(DEVICE), image(3, 2).to(DEVICE)))
    assert cache.replays == 1
    # What holds more than tensors runs as before.
    warm(cache.wrap(multi), (image(0).to(DEVICE),))
    assert len(cache) == 1


def test_released_recordings_are_made_anew(device):
    network = layers().to(DEVICE)
    cache = graphs.graphs_of(network)
    call = cache.wrap(network)
    warm(call, image(0).to(DEVICE))
    graphs.release_graphs(network)
    assert len(cache) == 0 and graphs.graphs_of(network) is cache
    warm(call, image(0).to(DEVICE))
    assert len(cache) == 1


def test_recordings_share_memory_with_those_of_their_own_function_alone(monkeypatch):
    pools = []

    def record(run, device, pool):
        pools.append(pool)
        return run(), lambda: None

    monkeypatch.setattr(graphs, "record_launches", record)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    cache = GraphCache()
    first, second = cache.wrap(lambda x: x + 1), cache.wrap(lambda x: x * 2)
    with torch.no_grad():
        for batch in (1, 2):
            warm(lambda x: second(first(x)), image(0, batch))
    assert len(cache) == 4 and pools[0] is pools[2] and pools[1] is pools[3] and pools[0] is not pools[1]

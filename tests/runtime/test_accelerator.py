"""Detectors on an accelerator, by a stand-in for CUDA: equal answers, few operators, few synchronisations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from serve import archive, convert, ops, zoo

ops.install("portable")

from serve.compare.detections import compare_answers  # noqa: E402
from serve.compare.tolerances import TOLERANCES  # noqa: E402
from serve.convert.golden import golden_frame  # noqa: E402
from serve.convert.random_weights import write_random_checkpoint  # noqa: E402
from serve.protocol.options import FrameOptions  # noqa: E402
from serve.runtime import load_detector  # noqa: E402
from serve.runtime.accelerator.graphs import CALLS_BEFORE, graphs_of  # noqa: E402
from serve.runtime.accelerator.stand_in import DEVICE, stand_in_device  # noqa: E402
from serve.runtime.accelerator.transfer import download  # noqa: E402
from serve.runtime.pipeline import frame_spec  # noqa: E402
from serve.settings import Limits  # noqa: E402
from tests.e2e.small_models import smaller_pictures  # noqa: E402
from tools.bench.operators import BOUNDS, WAITING_PER_IMAGE, count  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


def synchronisations_of(call: Callable[[torch.Tensor], object]) -> int:
    with stand_in_device() as device:
        values = torch.arange(6.0).to(DEVICE)
        device.reset()
        call(values)
        return device.counts.synchronisation_count


@pytest.mark.parametrize(
    "call",
    [
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.sum().item(),
        lambda x: bool((x > 2).any()),
        lambda x: int(x[3]),
        lambda x: (x > 2).nonzero(),
        lambda x: x[x > 2],
        lambda x: x.masked_select(x > 2),
        lambda x: x.unique(),
        lambda x: x.__setitem__(x > 2, torch.ones(3, device=DEVICE)),
        lambda x: torch.empty(6).copy_(x),
        lambda x: torch.repeat_interleave(x, x.long()),
    ],
)
def test_call_that_waits_for_the_device_is_counted(call):
    assert synchronisations_of(call) == 1


@pytest.mark.parametrize(
    "call",
    [
        lambda x: x + 1,
        lambda x: x[torch.arange(2, device=DEVICE)],
        lambda x: x[2:],
        lambda x: x[[2, 1, 0]],
        lambda x: x.__setitem__(x > 2, 0.0),
        lambda x: torch.where(x > 2, x, 0.0),
        lambda x: torch.repeat_interleave(x, x.long(), output_size=15),
        lambda x: torch.ones(3).to(DEVICE),
        lambda x: x.to(DEVICE),
    ],
)
def test_call_that_does_not_wait_is_not_counted(call):
    assert synchronisations_of(call) == 0


def test_views_are_no_operators_and_uploads_are_counted_apart():
    with stand_in_device() as device:
        values = torch.arange(6.0).to(DEVICE)
        device.reset()
        (values.view(2, 3).t()[1:] * 2).add_(1)
        torch.ones(2).to(DEVICE)
        torch.ones(2).add_(1)  # the processor's own
        assert device.counts.operators == {"mul": 1, "add_": 1, "_to_copy": 1}
        assert device.counts.uploads == 1


@pytest.mark.parametrize(
    "call",
    [
        lambda x: x + torch.ones(6),
        lambda x: torch.cat((x, torch.ones(1))),
        lambda x: torch.arange(6)[x.long()],
        lambda x: x.numpy(),
    ],
)
def test_stand_in_refuses_what_cuda_refuses(call):
    with pytest.raises((RuntimeError, TypeError)):
        synchronisations_of(call)


def test_places_in_lists_and_arrays_are_those_that_are_read_and_written():
    with stand_in_device():
        values = torch.arange(6.0).to(DEVICE)
        assert values[[4, 1]].tolist() == [4, 1] and values[np.array([2])].tolist() == [2]
        values[[0, 5]] = 9.0
        assert values.tolist() == [9, 1, 2, 3, 4, 9]
        assert values.new_tensor([1, 2]).tolist() == torch.tensor([1, 2], device=DEVICE).tolist() == [1, 2]


def test_module_moves_to_the_stand_in_and_computes_there():
    layer = torch.nn.Conv2d(3, 4, 3)
    image = torch.rand(1, 3, 8, 8)
    with stand_in_device(), torch.no_grad():
        expected = layer(image)
        got = layer.to(DEVICE)(image.to(DEVICE))
        assert got.device == DEVICE and torch.equal(got.cpu(), expected)


def test_tensors_of_all_kinds_are_downloaded_with_one_synchronisation():
    made = [
        torch.rand(3, 2),
        torch.tensor(7),
        torch.tensor([True, False, True]),
        torch.arange(5, dtype=torch.int32),
        torch.rand(2).half(),
    ]
    with stand_in_device() as device:
        there = [one.to(DEVICE) for one in made]
        device.reset()
        back = download(there)
        assert device.counts.synchronisation_count == 1
    for one, other in zip(back, made, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


@pytest.fixture(scope="module", params=list(BOUNDS))
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> archive.Archive:
    """A model of the zoo with random weights; pictures are smaller, which changes no number of operators."""
    folder = tmp_path_factory.mktemp(request.param)
    config = zoo.resolve(request.param).config_path
    if frame_spec(convert.resolve_config(config).config).modality == "image":
        config = smaller_pictures(request.param, folder)
    resolved = convert.resolve_config(config).config
    write_random_checkpoint(resolved, tuple(convert.configured_classes(resolved)), folder / "r.pth")
    conversion = convert.Conversion(config, folder / "r.pth", folder, request.param, device="cpu")
    return archive.extract(convert.convert(conversion).path, folder / "opened")


def frames_of(opened: archive.Archive) -> list[Any]:
    """The golden frame and, of a point cloud, one with fewer points."""
    ((_, body),) = golden_frame(frame_spec(opened.config())).values()
    if opened.metadata.modality != "lidar":
        return [body]
    cloud = np.frombuffer(body, np.float32).reshape(-1, opened.metadata.load_dim)
    return [body, cloud[::2].tobytes()]


@pytest.mark.slow
def test_model_on_an_accelerator_answers_as_on_the_cpu_within_bounds(opened: archive.Archive) -> None:
    row = count(opened, frames_of(opened)[0])
    assert row.equal and row.detections > 0, row
    most_operators, most_synchronisations = BOUNDS[row.model]
    assert row.operators <= most_operators and row.synchronisations <= most_synchronisations, row


@pytest.mark.slow
def test_replayed_launches_answer_each_frame_as_on_the_cpu(opened: archive.Archive) -> None:
    bodies = frames_of(opened)
    loops = load_detector(opened, torch.device("cpu"))

    def run(detector: Any, body: Any) -> Any:
        return detector.run([detector.decode(body, FrameOptions(), Limits())])[0]

    expected = [run(loops, body) for body in bodies]
    with stand_in_device() as device:
        detector = load_detector(opened, DEVICE, cuda_graphs=True)
        for _ in range(CALLS_BEFORE):
            run(detector, bodies[0])
        for body, wanted in zip(bodies, expected, strict=True):
            device.reset()
            got = run(detector, body)
            found = compare_answers(got, wanted, TOLERANCES["float32"], sides=("replayed", "cpu"))
            assert found.ok, found.verdict()
            assert device.counts.operators["graph"] == 2 and device.counts.operators["convolution"] <= 10
        assert graphs_of(detector.network).disabled is None


@pytest.mark.slow
def test_frame_in_a_batch_on_an_accelerator_answers_as_alone(opened: archive.Archive) -> None:
    bodies = frames_of(opened)
    bodies = bodies if len(bodies) > 1 else bodies * 2
    with stand_in_device() as device:
        detector = load_detector(opened, DEVICE)

        def run(some: list[Any]) -> list[Any]:
            return detector.run([detector.decode(one, FrameOptions(), Limits()) for one in some])

        alone = [run([body])[0] for body in bodies]
        device.reset()
        together = run(bodies)
        times = len(bodies) if opened.metadata.name in WAITING_PER_IMAGE else 1
        assert device.counts.synchronisation_count <= BOUNDS[opened.metadata.name][1] * times
    for one, other in zip(together, alone, strict=True):
        assert compare_answers(one, other, TOLERANCES["float32"], sides=("batch", "alone")).ok

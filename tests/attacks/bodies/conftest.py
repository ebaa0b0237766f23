"""A gateway process in front of a fake TorchServe with a model of point clouds and one of images."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.attacks.gateway_process import GatewayProcess, gateway_process
from tests.gateway.fake_torchserve import IMAGES, FakeModel, FakeTorchServe
from tests.gateway.running import Background, Listening


@pytest.fixture(scope="module")
def attacked() -> Iterator[GatewayProcess]:
    background = Background()

    async def make() -> FakeTorchServe:
        made = FakeTorchServe()
        made.models["camera"] = {"1.0": FakeModel(spec=dict(IMAGES))}
        return made

    listening = Listening(background, background.call(make()))
    try:
        with gateway_process(inference_url=listening.url, management_url=listening.url) as gateway:
            yield gateway
    finally:
        listening.close()
        background.stop()

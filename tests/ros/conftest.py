"""Fixtures: the gateway of the gateway's tests."""

from tests.gateway.conftest import backend, background, cloud, gateway, start_gateway, torchserve

__all__ = ["backend", "background", "cloud", "gateway", "start_gateway", "torchserve"]

"""The health protocol: grpc.health.v1."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress

import grpc
from google.protobuf.message import DecodeError
from starlette.types import ASGIApp

from serve.gateway.admission import client_of
from serve.gateway.grpc.calls import Exchange
from serve.gateway.grpc.intake import Intake
from serve.gateway.grpc.messages import HEALTH, INFERENCE, message_class
from serve.gateway.grpc.reading import OpenStreams
from serve.gateway.grpc.running import Answer, RunningCall
from serve.gateway.grpc.status import CallError
from serve.gateway.lifecycle import Lifecycle
from serve.gateway.options import GatewayOptions

__all__ = ["Health"]

_SERVICES = ("", INFERENCE, HEALTH)
_PERIOD_S = 1.0

_HealthRequest = message_class("grpc.health.v1.HealthCheckRequest")
_HealthResponse = message_class("grpc.health.v1.HealthCheckResponse")


class Health:
    """Answers whether the application is ready."""

    def __init__(self, app: ASGIApp, options: GatewayOptions, lifecycle: Lifecycle, intake: Intake) -> None:
        """Ask `app`, until `lifecycle` stops; as many watches as streams may be open."""
        self._app = app
        self._lifecycle = lifecycle
        self._intake = intake
        self._watches = OpenStreams(options.max_grpc_streams, options.client_share)

    async def check(self, call: RunningCall) -> Answer:
        """Answer once."""
        service = await self._read_service(call)
        if service not in _SERVICES:
            return Answer(CallError(grpc.StatusCode.NOT_FOUND, f"unknown service {service[:80]!r}", ""))
        await call.write(await self._health(call))
        return Answer()

    async def watch(self, call: RunningCall) -> Answer:
        """Answer now and after each change, until the server stops.

        Raises:
            Overloaded: too many watches are open. They need no key, and would take the places of all other calls.
        """
        client = client_of({"client": call.client})
        self._watches.open(client)
        try:
            return await self._watch(call)
        finally:
            self._watches.close(client)

    async def _watch(self, call: RunningCall) -> Answer:
        if await self._read_service(call) not in _SERVICES:
            await call.write(_HealthResponse(status="SERVICE_UNKNOWN").SerializeToString())
            await self._lifecycle.stopping.wait()
            return Answer()
        last = b""
        while not self._lifecycle.stopping.is_set():
            if (now := await self._health(call)) != last:
                await call.write(now)
                last = now
            with suppress(TimeoutError):
                await asyncio.wait_for(self._lifecycle.stopping.wait(), _PERIOD_S)
        return Answer()

    async def _read_service(self, call: RunningCall) -> str:
        message = await self._intake.read(call, client_of({"client": call.client}))
        try:
            return str(_HealthRequest.FromString(message).service)
        except DecodeError:
            return "?"

    async def _health(self, call: RunningCall) -> bytes:
        """Return the present HealthCheckResponse."""
        found = 0

        async def finish(status: int, headers: Mapping[bytes, bytes], body: bytes) -> None:
            nonlocal found
            found = status

        await Exchange(self._app, "/v2/health/ready", call.headers, call.client, finish).run()
        return bytes(_HealthResponse(status="SERVING" if found == 200 else "NOT_SERVING").SerializeToString())

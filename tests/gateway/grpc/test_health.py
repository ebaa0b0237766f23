"""The health protocol, and the way a server ends."""

from __future__ import annotations

import queue
import threading
from typing import Any

import pytest

grpc = pytest.importorskip("grpc", reason="needs the extra grpc")

from serve.errors import SettingsError  # noqa: E402
from serve.gateway.app import create_app  # noqa: E402
from serve.gateway.grpc.messages import HEALTH, INFERENCE, message_class  # noqa: E402
from serve.gateway.options import GatewayOptions  # noqa: E402
from tests.gateway.running import eventually  # noqa: E402

Response = message_class("grpc.health.v1.HealthCheckResponse")


def request(service: str = "") -> bytes:
    return message_class("grpc.health.v1.HealthCheckRequest")(service=service).SerializeToString()


def status(client: Any, service: str = "") -> str:
    check = client.channel.unary_unary(f"/{HEALTH}/Check", response_deserializer=Response.FromString)
    found = check(request(service), timeout=10)
    return found.DESCRIPTOR.enum_types_by_name["ServingStatus"].values_by_number[found.status].name


def test_check_answers_without_a_key(start_grpc) -> None:
    client = start_grpc(api_keys=("secret",))
    assert eventually(lambda: status(client) == "SERVING") and status(client, INFERENCE) == "SERVING"
    client.gateway.lifecycle.drain()
    assert status(client) == "NOT_SERVING"


def test_check_does_not_know_other_services(client) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        status(client, "nobody")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_watch_says_when_readiness_changes(client, background) -> None:
    eventually(lambda: status(client) == "SERVING")
    watch = client.channel.unary_stream(f"/{HEALTH}/Watch", response_deserializer=Response.FromString)
    found: queue.Queue[int] = queue.Queue()
    call = watch(request(), timeout=30)
    thread = threading.Thread(target=lambda: [found.put(each.status) for each in call])
    thread.start()
    assert found.get(timeout=10) == 1
    client.gateway.lifecycle.drain()
    assert found.get(timeout=10) == 2
    background.soon(client.gateway.lifecycle.stop)  # which ends the watch
    thread.join(10)
    assert not thread.is_alive() and call.code() is grpc.StatusCode.OK


@pytest.mark.parametrize("method", ["Check", "Watch"])
def test_health_call_without_a_message_is_an_invalid_argument(client, method, caplog) -> None:
    call = client.channel.stream_stream(f"/{HEALTH}/{method}")(iter(()), timeout=10)
    with pytest.raises(grpc.RpcError):
        next(call)
    assert call.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert ("error-code", "bad_request") in call.trailing_metadata()
    assert not [record for record in caplog.records if record.exc_info]
    counted = f'grpc_calls_total{{method="{method}",status="INVALID_ARGUMENT"}} 1.0'
    assert counted in client.gateway.client.get("/metrics").text


@pytest.mark.parametrize("service", ["", "nobody"])
def test_watches_of_a_client_are_bounded_and_others_checks_go_on(start_grpc, service) -> None:
    client = start_grpc(max_grpc_streams=2, client_share=0.5)
    watch = client.channel.unary_stream(f"/{HEALTH}/Watch", response_deserializer=Response.FromString)
    first = watch(request(service), timeout=30)
    next(first)
    with pytest.raises(grpc.RpcError) as caught:
        next(watch(request(service), timeout=10))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert ("grpc-retry-pushback-ms", "1000") in caught.value.trailing_metadata()
    assert status(client) in ("SERVING", "NOT_SERVING")
    first.cancel()

    def is_free() -> bool:
        call = watch(request(service), timeout=10)
        try:
            return next(call) is not None
        except grpc.RpcError:
            return False
        finally:
            call.cancel()

    assert eventually(is_free)


def test_calls_in_flight_are_answered_when_the_server_stops(start_grpc, backend, background, cloud) -> None:
    from tests.gateway.grpc.test_infer import points

    client = start_grpc()
    backend.hold()
    ended: queue.Queue[Any] = queue.Queue()
    client.async_infer("second", [points(cloud(1))], lambda result, error: ended.put((result, error)))
    eventually(lambda: client.gateway.admission.items == 1)
    background.soon(client.gateway.lifecycle.stop)

    def refused() -> bool:
        try:
            status(client)
        except grpc.RpcError as error:
            return error.code() is grpc.StatusCode.UNAVAILABLE
        return False

    eventually(refused)
    backend.release()
    result, error = ended.get(timeout=10)
    assert error is None and result.as_numpy("num_detections").size == 1


def test_missing_package_is_a_settings_error(monkeypatch) -> None:
    import sys

    monkeypatch.delitem(sys.modules, "serve.gateway.grpc.server")
    monkeypatch.setitem(sys.modules, "grpc", None)
    with pytest.raises(SettingsError, match=r"requirements/grpc\.lock"):
        create_app(GatewayOptions(grpc_port=0))

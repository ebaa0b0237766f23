"""Which addresses count as public, in every form that carries another address."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.storage.addresses import is_public

PRIVATE_4 = (
    "0.0.0.0",
    "0.1.2.3",
    "10.1.2.3",
    "100.64.0.1",
    "100.127.255.255",
    "127.0.0.1",
    "127.255.0.1",
    "169.254.169.254",
    "172.16.0.1",
    "172.31.255.255",
    "192.0.0.1",
    "192.0.0.9",
    "192.0.0.170",
    "192.0.2.1",
    "192.88.99.1",
    "192.168.1.1",
    "198.18.0.1",
    "198.19.255.255",
    "198.51.100.1",
    "203.0.113.1",
    "224.0.0.1",
    "239.255.255.255",
    "240.0.0.1",
    "255.255.255.255",
)
PUBLIC_4 = ("8.8.8.8", "1.1.1.1", "93.184.216.34", "172.32.0.1", "100.128.0.1", "198.20.0.1", "223.255.255.1")


def carried(form: str, address: str) -> str:
    """Write an IPv4 address as the IPv6 address that carries it."""
    number = int(ipaddress.IPv4Address(address))
    six = {
        "mapped": (0xFFFF << 32) | number,
        "compatible": number,
        "translated": (0xFFFF << 48) | number,  # ::ffff:0:0:0/96 of SIIT
        "nat64": (0x64FF9B << 96) | number,
        "local nat64": (0x64FF9B0001 << 80) | number,
        "6to4": (0x2002 << 112) | (number << 80),
        "teredo": (0x20010000 << 96) | (number ^ 0xFFFFFFFF),
        "teredo server": (0x20010000 << 96) | (number << 64),
    }[form]
    return str(ipaddress.IPv6Address(six))


FORMS = ("mapped", "compatible", "translated", "nat64", "local nat64", "6to4", "teredo", "teredo server")


@pytest.mark.parametrize("address", PRIVATE_4)
def test_private_address_is_not_public_in_any_form(address):
    assert not is_public(address)
    assert [form for form in FORMS if is_public(carried(form, address))] == []


@pytest.mark.parametrize("address", PUBLIC_4)
def test_public_address_is_public_where_it_is_what_is_connected_to(address):
    assert is_public(address)
    assert [form for form in FORMS if is_public(carried(form, address))] == ["mapped", "nat64", "6to4"]


@pytest.mark.parametrize("address", ["2606:4700:4700::1111", "2001:4860:4860::8888", "2a00:1450::1"])
def test_assigned_ipv6_address_is_public_unless_scoped(address):
    assert is_public(address) and not is_public(f"{address}%eth0")


@pytest.mark.parametrize(
    "address",
    [
        "::",
        "::1",
        "::1%lo",
        "::8.8.8.8",
        "::1:2:3",
        "64:ff9b:1::1",
        "100::1",
        "2001::1",
        "2001:2::1",
        "2001:10::1",
        "2001:20::1",
        "2001:db8::1",
        "3fff::1",
        "4000::1",
        "5f00::1",
        "fc00::1",
        "fd00::1",
        "fe80::1",
        "fe80::1%eth0",
        "fec0::1",
        "feff::1",
        "ff02::1",
        "ff0e::1",
    ],
)
def test_special_ipv6_address_is_not_public(address):
    assert not is_public(address)


@given(st.ip_addresses())
def test_address_is_public_only_if_python_calls_it_global_or_what_it_carries(address):
    if is_public(str(address)):
        inner = address
        if isinstance(address, ipaddress.IPv6Address):
            inner = address.ipv4_mapped or address.sixtofour or address
        assert inner.is_global and not inner.is_multicast and not inner.is_private

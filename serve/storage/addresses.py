"""Which IP addresses are public: assigned to hosts of the internet, whatever form they are written in.

`ipaddress.is_global` alone depends on Python's version, counts multicast and site-local addresses, and does not look
into IPv6 addresses that carry an IPv4 address. So IPv6 is public only within 2000::/3, the one block that is assigned
to hosts, and an address that carries another is public only if that one is.
"""

from __future__ import annotations

import ipaddress

__all__ = ["is_public"]

_HOSTS = ipaddress.IPv6Network("2000::/3")
# The IPv4 address of a translated destination (RFC 4291, RFC 6052): in the last 32 bits.
_TRANSLATED = tuple(map(ipaddress.IPv6Network, ("::ffff:0:0/96", "64:ff9b::/96")))
# Special blocks (IANA's registries) that `is_global` lets through in one Python or another.
_SPECIAL_6 = tuple(map(ipaddress.IPv6Network, ("2001::/23", "2001:db8::/32", "3fff::/20")))
_SPECIAL_4 = tuple(
    map(
        ipaddress.IPv4Network,
        (
            "0.0.0.0/8",
            "10.0.0.0/8",
            "100.64.0.0/10",
            "127.0.0.0/8",
            "169.254.0.0/16",
            "172.16.0.0/12",
            "192.0.0.0/24",
            "192.0.2.0/24",
            "192.88.99.0/24",
            "192.168.0.0/16",
            "198.18.0.0/15",
            "198.51.100.0/24",
            "203.0.113.0/24",
            "224.0.0.0/3",  # multicast, reserved, broadcast
        ),
    )
)


def is_public(text: str) -> bool:
    """Return whether an address belongs to a host of the internet; one with a scope (``%eth0``) never does.

    Raises:
        ValueError: `text` is not an IP address.
    """
    address = ipaddress.ip_address(text)
    if isinstance(address, ipaddress.IPv4Address):
        return address.is_global and not any(address in block for block in _SPECIAL_4)
    if address.scope_id is not None:
        return False
    if any(address in block for block in _TRANSLATED):
        return is_public(str(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)))
    if address.sixtofour is not None:  # 2002::/16
        return is_public(str(address.sixtofour))
    return address in _HOSTS and address.is_global and not any(address in block for block in _SPECIAL_6)

"""Listening socket of the gateway, bound by itself or by its supervisor."""

from __future__ import annotations

import socket

from serve.errors import SettingsError

__all__ = ["bind", "url_of"]


def url_of(listener: socket.socket) -> str:
    """Return the URL of a bound socket."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def bind(host: str, port: int, *, shared: bool = False, flag: str = "--port") -> socket.socket:
    """Bind a TCP socket; it does not listen yet.

    Args:
        host: IP address.
        port: port; 0 picks a free one.
        flag: what the command line calls the port.
        shared: let other processes of the same user bind the port as well, if they ask for that too.

    Raises:
        SettingsError: the address is invalid or in use.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shared:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise SettingsError(
            f"cannot listen on {host} port {port}: {error.strerror}; end what uses it, or choose another with --host "
            f"and {flag} (of `serve` and `demo`: --gateway-host and --gateway-{flag.removeprefix('--')})"
        ) from None
    return listener

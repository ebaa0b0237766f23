"""HEALTHCHECK of the image: exit 0 if the gateway of this container is ready. Standard library only.

Requests `/health/ready` on loopback, at the port in MMDET3D_SERVE_GATEWAY_PORT; a port changed on the command line is
not seen.
"""

from __future__ import annotations

import http.client
import os
import sys

TIMEOUT_S = 4.0


def main() -> int:
    """Return 0 if ready, else 1; prints a line for `docker inspect`."""
    port = int(os.environ.get("MMDET3D_SERVE_GATEWAY_PORT") or 8000)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", "/health/ready")
        answer = connection.getresponse()
        print(answer.read(1000).decode(errors="replace"))
        return int(answer.status != http.HTTPStatus.OK)
    except (OSError, http.client.HTTPException) as error:
        print(f"port {port} does not respond: {error}")
        return 1
    finally:
        connection.close()


if __name__ == "__main__":
    sys.exit(main())

"""Exit 0 when the gateway of this container would answer a frame now; what HEALTHCHECK runs. Standard library only.

Asks `/health/ready` on loopback, at the port in MMDET3D_SERVE_GATEWAY_PORT. Knows nothing of ports that were changed
by a word on the command line.
"""

from __future__ import annotations

import http.client
import os
import sys

TIMEOUT_S = 4.0


def main() -> int:
    """0 when ready, 1 when not, each with a line that `docker inspect` shows."""
    port = int(os.environ.get("MMDET3D_SERVE_GATEWAY_PORT") or 8000)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", "/health/ready")
        answer = connection.getresponse()
        print(answer.read(1000).decode(errors="replace"))
        return int(answer.status != http.HTTPStatus.OK)
    except (OSError, http.client.HTTPException) as error:
        print(f"port {port} does not answer: {error}")
        return 1
    finally:
        connection.close()


if __name__ == "__main__":
    sys.exit(main())

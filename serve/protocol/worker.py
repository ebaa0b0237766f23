"""Socket protocol between the gateway and a worker: headers, hello and socket path.

Each worker listens on a Unix socket, `socket_path`. All integers are little-endian.

1. On accept the worker sends `HELLO`. No hello means that it is full or hung.
2. The gateway sends a batch: `BATCH_HEADER` (length in bytes, uint64; compute limit in whole seconds, uint32, 0 for
   none), then a framed batch of that length (`serve.protocol.batch.frame_chunks`).
3. The worker answers with `LENGTH` (uint64) and framed outcomes of that length. Length 0 means that it could not
   answer; the gateway then sends the batch through TorchServe, which reports the reason.

Steps 2 and 3 repeat until one side closes the connection. `serve.gateway.worker_client` is one end,
`serve.worker.server` the other.
"""

from __future__ import annotations

import struct
from pathlib import Path

__all__ = ["BATCH_HEADER", "HELLO", "LENGTH", "MAX_MESSAGE_BYTES", "socket_path"]

BATCH_HEADER = struct.Struct("<QI")  # bytes, seconds
LENGTH = struct.Struct("<Q")  # bytes
HELLO = LENGTH.pack(0)
MAX_MESSAGE_BYTES = (1 << 31) - 1  # TorchServe's own limit


def socket_path(folder: Path, pid: int) -> Path:
    """Path of the socket on which the worker with process id `pid` listens."""
    return folder / f"{pid}.sock"

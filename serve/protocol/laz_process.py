"""A process that unpacks one LAZ file: standard input to an npz of columns on standard output.

lazrs (Rust) panics or aborts on some damaged files, and believes the sizes in its chunk table; in a process of its own
with a bound on memory that costs one frame. Runs as a script, so that it imports laspy and numpy only.
"""

from __future__ import annotations

import io
import resource
import sys

__all__ = ["main"]


def main() -> int:
    """Unpack; exit status 0, or 1 with the reason on standard error."""
    bound, seconds, count = (int(text) for text in sys.argv[1:4])
    import laspy
    import numpy as np

    resource.setrlimit(resource.RLIMIT_AS, (bound, bound))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    file = io.BytesIO(sys.stdin.buffer.read())
    with laspy.open(file, laz_backend=laspy.LazBackend.Lazrs, read_evlrs=False) as reader:
        points = reader.read_points(count)
        columns = {axis: np.asarray(getattr(points, axis), dtype=np.float64) for axis in "xyz"}
        for name in points.point_format.dimension_names:
            if name not in ("X", "Y", "Z"):
                columns[name] = np.asarray(points[name])
    packed = io.BytesIO()
    np.savez(packed, **columns)  # type: ignore[arg-type]
    sys.stdout.buffer.write(packed.getvalue())
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except Exception as error:
        sys.exit(str(error).splitlines()[0][:200] if str(error) else type(error).__name__)

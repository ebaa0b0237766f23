"""Turn whatever a config or checkpoint makes other code raise into an error that names it.

Configs and checkpoints are programs and data of other people: a wrong member fails somewhere in upstream's code, with
any exception. A person gets one line; the exception itself is its cause.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from serve.errors import ArchiveError, ServeError, SetupError

__all__ = ["blaming", "describe"]


@contextlib.contextmanager
def blaming(what: str, kind: type[SetupError] = ArchiveError) -> Iterator[None]:
    """Raise `kind` about `what` in place of an exception that is not the project's own.

    Args:
        what: subject of the message, such as ``config mine.py``.
        kind: error to raise.
    """
    try:
        yield
    except ServeError:
        raise
    except Exception as error:
        raise kind(f"{what} cannot be used: {describe(error)}") from error


def describe(error: BaseException) -> str:
    """Type and first lines of an exception; a traceback's place says nothing to a person."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:500]}" if text else type(error).__name__

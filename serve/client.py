"""Ask a server for detections: one frame out, one answer back.

Speaks TorchServe's predictions API (``POST /predictions/NAME[/VERSION]``) as our handlers answer it, which
our gateway speaks as well. Whatever goes wrong is raised from the tree in `serve.errors`: the server's own
error bodies, TorchServe's, and those of the connection.

Knows nothing about frames, models or torch: bytes go out as they are. Proxies named in the environment are
not used, because the server meant is the one whose address was given.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import httpx

from serve.errors import BackendBroken, BadRequest, DeadlineExceeded, NotReady, error_from_response

__all__ = ["Client"]

_CONNECT_S = 10.0  # a server that is there takes a connection sooner
MAX_QUOTED_CHARS = 200  # how much of an unreadable answer an error message repeats


class Client:
    """A connection to one inference server; a context manager, usable from one thread at a time.

    Args:
        address: ``host:port`` or a full ``http(s)://`` URL.
        token: bearer token sent with every request, where the server asks for one. Never printed.
        timeout_s: seconds to wait for an answer, unless a call says otherwise.
    """

    def __init__(self, address: str, *, token: str | None = None, timeout_s: float = 120.0) -> None:
        """Check the address; nothing is sent yet."""
        url = address if "://" in address else f"http://{address}"
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        try:
            parsed = httpx.URL(url)
            if parsed.scheme not in ("http", "https") or not parsed.host:
                raise httpx.InvalidURL("no host")
            self._http = httpx.Client(base_url=parsed, headers=headers, timeout=timeout_s, trust_env=False)
        except (httpx.InvalidURL, ValueError) as error:
            message = f"{address!r} is no server address; write host:port, for example 127.0.0.1:8080"
            raise BadRequest(message) from error
        self._address = address
        self._timeout_s = timeout_s

    def __enter__(self) -> Self:
        """Keep the connection open over several requests."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the connection."""
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._http.close()

    def predict(
        self,
        frame_bytes: bytes | Mapping[str, bytes],
        model: str,
        version: str | None = None,
        *,
        content_type: str = "application/octet-stream",
        score_thr: float | None = None,
        max_detections: int | None = None,
        num_points: int | None = None,
        timeout_s: float | None = None,
    ) -> dict[str, Any]:
        """Send one frame and return its detections.

        Args:
            frame_bytes: a cloud (``.bin`` or ``.npy``) or an encoded image, as read from its file; for a model
                that takes several parts the bytes of each by name (``points``, ``image``, ``image.CAM_FRONT``,
                ``calibration``), which go out as form fields.
            model: the name the model is served under.
            version: the version served; the server's default when None.
            content_type: media type of ``frame_bytes``; of no account for several parts.
            score_thr: the server leaves out detections that score less; its own default when None.
            max_detections: the server answers the best so many; its own default when None.
            num_points: how many points a cloud has; the server checks it, and an empty ``.bin`` needs it.
            timeout_s: seconds to wait for this answer instead of the client's own limit.

        Returns:
            The answer as a dictionary of OpenMMLab's names (``bboxes_3d``, …, ``bboxes``, …, or labels).

        Raises:
            NotReady: nothing listens there, or the server is starting, draining or lost its worker.
            DeadlineExceeded: no answer within the time limit.
            BackendBroken: the connection broke off, or the answer is no detections.
            ServeError: whatever the server's own error body says, as the class it names.
        """
        path = f"/predictions/{quote(model, safe='')}"
        if version is not None:
            path += f"/{quote(version, safe='')}"
        options = {"score_thr": score_thr, "max_detections": max_detections, "num_points": num_points}
        # TorchServe drops the query string of /predictions, so options travel as headers.
        said = {
            f"X-{name.replace('_', '-').title()}": str(value)
            for name, value in options.items()
            if value is not None
        }
        limit_s = self._timeout_s if timeout_s is None else timeout_s
        sent: dict[str, Any] = {"headers": said}
        if isinstance(frame_bytes, Mapping):
            sent["files"] = {
                name: (name, body, "application/octet-stream") for name, body in frame_bytes.items()
            }
        else:
            sent |= {"content": frame_bytes, "headers": {"Content-Type": content_type, **said}}
        with self._connection_errors(limit_s):
            response = self._http.post(
                path, timeout=httpx.Timeout(limit_s, connect=min(limit_s, _CONNECT_S)), **sent
            )
        answer = _json(response)
        if response.status_code != 200:
            raise error_from_response(response.status_code, answer, response.text)
        if not isinstance(answer, dict):
            shown = response.text[:MAX_QUOTED_CHARS]
            raise BackendBroken(
                f"{self._address} did not answer with detections of one frame but with: {shown}"
            )
        if "error" in answer:  # an outcome inside a 200 would be a broken contract, never a detection
            raise error_from_response(502, answer, response.text)
        return answer

    @contextmanager
    def _connection_errors(self, limit_s: float) -> Iterator[None]:
        """Exceptions of httpx → ours, each with a sentence that says what to change."""
        where = self._address
        try:
            yield
        except httpx.ConnectTimeout as error:
            raise NotReady(
                f"{where} took no connection within {limit_s:g} s; is the address right?"
            ) from error
        except httpx.TimeoutException as error:
            raise DeadlineExceeded(f"{where} gave no answer within {limit_s:g} s") from error
        except httpx.ConnectError as error:
            message = f"no server answers at {where} ({error}); start it, or say where it is"
            raise NotReady(message) from error
        except httpx.TransportError as error:
            raise BackendBroken(f"the connection to {where} broke off: {error}") from error


def _json(response: httpx.Response) -> Any:
    try:
        return json.loads(response.content)
    except ValueError:
        return None

"""Client of the predictions API: sends one frame, returns its detections.

Speaks ``POST /predictions/NAME[/VERSION]`` with TorchServe or the gateway. Every failure raises an error of
`serve.errors`: error bodies of either server, and failures of the connection. Frames are sent unchanged.
Proxies in the environment are ignored, so that the client reaches the server at the given address.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import httpx

from serve.errors import (
    BackendBroken,
    BadRequest,
    DeadlineExceeded,
    ModelNotFound,
    NotReady,
    error_from_response,
)

__all__ = ["Client"]

_CONNECT_S = 10.0  # enough for any server that runs
_MAX_QUOTED_CHARS = 200  # of an unexpected answer in an error message


class Client:
    """Connection to one inference server; a context manager, for one thread at a time.

    Args:
        address: ``host:port`` or a full ``http(s)://`` URL.
        token: bearer token sent with every request; never printed.
        timeout_s: default timeout of an answer, seconds.
    """

    def __init__(self, address: str, *, token: str | None = None, timeout_s: float = 120.0) -> None:
        """Check the address without connecting."""
        url = address if "://" in address else f"http://{address}"
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        try:
            parsed = httpx.URL(url)
            if parsed.scheme not in ("http", "https") or not parsed.host:
                raise httpx.InvalidURL("no host")
            self._http = httpx.Client(base_url=parsed, headers=headers, timeout=timeout_s, trust_env=False)
        except (httpx.InvalidURL, ValueError) as error:
            message = f"invalid server address {address!r}; use host:port, for example 127.0.0.1:8080"
            raise BadRequest(message) from error
        self._address = address
        self._timeout_s = timeout_s

    def __enter__(self) -> Self:
        """Keep the connection open for several requests."""
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
        columns: str | None = None,
        sweeps: str | None = None,
        timeout_s: float | None = None,
    ) -> dict[str, Any]:
        """Send one frame and return its detections.

        Args:
            frame_bytes: a point cloud (``.bin``, ``.npy``, PCD, …) or an encoded image, as read from its file; for
                several parts, the bytes of each part by name (``points``, ``image``, ``image.CAM_FRONT``,
                ``calibration``; of several sweeps ``points``, ``sweep.0``, …, ``sweeps``), sent as form fields.
            model: name of the served model.
            version: its version; the server's default if None.
            content_type: media type of ``frame_bytes``; ignored for several parts.
            score_thr: minimum score of a detection; the server's default if None.
            max_detections: maximum number of detections, best first; the server's default if None.
            num_points: number of points, which the server checks; required for an empty ``.bin``.
            columns: columns of the point cloud, as in ``x,y,z,intensity=0``.
            sweeps: ``accumulated`` if the point cloud has the points and times of several sweeps.
            timeout_s: timeout of this answer, seconds, instead of the client's.

        Returns:
            The answer as a dictionary with OpenMMLab's names (``bboxes_3d``, …, ``bboxes``, …, or labels).

        Raises:
            NotReady: nothing listens at the address, or the server is starting, draining or lost its worker.
            DeadlineExceeded: no answer within the timeout.
            BackendBroken: the connection was lost, or the answer is not detections.
            ServeError: the error in the server's answer, as the class of its code.
        """
        options = {
            "score_thr": score_thr,
            "max_detections": max_detections,
            "num_points": num_points,
            "columns": columns,
            "sweeps": sweeps,
        }
        answer, _ = self._predict(frame_bytes, model, version, options, content_type, timeout_s)
        return answer

    def predict_encoded(
        self,
        frame_bytes: bytes | Mapping[str, bytes],
        model: str,
        version: str | None = None,
        *,
        options: Mapping[str, Any],
        content_type: str = "application/octet-stream",
    ) -> tuple[dict[str, Any], bytes]:
        """Send one frame and return its detections, parsed and as the bytes that the server sent.

        Args:
            frame_bytes: as for `predict`.
            model: name of the served model.
            version: its version; the server's default if None.
            options: options of `predict` by name; None leaves one out.
            content_type: media type of ``frame_bytes``; ignored for several parts.

        Raises:
            ServeError: as `predict`.
        """
        return self._predict(frame_bytes, model, version, options, content_type, None)

    def _predict(
        self,
        frame_bytes: bytes | Mapping[str, bytes],
        model: str,
        version: str | None,
        options: Mapping[str, Any],
        content_type: str,
        timeout_s: float | None,
    ) -> tuple[dict[str, Any], bytes]:
        path = f"/predictions/{quote(model, safe='')}"
        if version is not None:
            path += f"/{quote(version, safe='')}"
        # TorchServe drops the query string of /predictions, so options travel as headers.
        option_headers = {
            f"X-{name.replace('_', '-').title()}": str(value)
            for name, value in options.items()
            if value is not None
        }
        limit_s = self._timeout_s if timeout_s is None else timeout_s
        request: dict[str, Any] = {"headers": option_headers}
        if isinstance(frame_bytes, Mapping):
            request["files"] = {
                name: (name, body, "application/octet-stream") for name, body in frame_bytes.items()
            }
        else:
            request |= {"content": frame_bytes, "headers": {"Content-Type": content_type, **option_headers}}
        with self._map_errors(limit_s):
            response = self._http.post(
                path, timeout=httpx.Timeout(limit_s, connect=min(limit_s, _CONNECT_S)), **request
            )
        answer = _json(response)
        if response.status_code != 200:
            raise error_from_response(response.status_code, answer, response.text)
        if not isinstance(answer, dict):
            shown = response.text[:_MAX_QUOTED_CHARS]
            raise BackendBroken(
                f"unexpected answer of {self._address}, not the detections of one frame: {shown}"
            )
        if "error" in answer:  # an error with status 200 violates the contract
            raise error_from_response(502, answer, response.text)
        return answer, response.content

    def describe(self, model: str, version: str | None = None) -> dict[str, Any] | None:
        """Return the gateway's description of a model: modality, parts, classes and so on.

        Args:
            model: name of the served model.
            version: its version; the default one if None.

        Returns:
            One entry of ``GET /models``; None if the server is TorchServe, which has no such route.

        Raises:
            ModelNotFound: the gateway has no such model or version.
            ServeError: as `predict`.
        """
        with self._map_errors(self._timeout_s):
            response = self._http.get(f"/models/{quote(model, safe='')}")
        answer = _json(response)
        if response.status_code in (404, 405) and not _is_own_error(answer):
            return None
        if response.status_code != 200:
            raise error_from_response(response.status_code, answer, response.text)
        if not isinstance(answer, list) or not all(isinstance(each, dict) for each in answer):
            raise BackendBroken(f"unexpected answer of {self._address}, not a list of models")
        entries: list[dict[str, Any]] = answer
        for each in entries:
            if each.get("version") == version if version is not None else each.get("default"):
                return each
        raise ModelNotFound(f"{self._address} has no version {version} of model '{model}'")

    @contextmanager
    def _map_errors(self, limit_s: float) -> Iterator[None]:
        """Map exceptions of httpx to errors of `serve.errors`."""
        where = self._address
        try:
            yield
        except httpx.ConnectTimeout as error:
            raise NotReady(f"cannot connect to {where} within {limit_s:g} s; check the address") from error
        except httpx.TimeoutException as error:
            raise DeadlineExceeded(f"{where} did not answer within {limit_s:g} s") from error
        except httpx.ConnectError as error:
            message = f"cannot connect to {where} ({error}); start the server, or pass its address"
            raise NotReady(message) from error
        except httpx.TransportError as error:
            raise BackendBroken(f"lost the connection to {where}: {error}") from error


def _is_own_error(answer: Any) -> bool:
    """Whether a body is an error of this project's gateway."""
    return isinstance(answer, dict) and isinstance(answer.get("error"), dict)


def _json(response: httpx.Response) -> Any:
    try:
        return json.loads(response.content)
    except ValueError:
        return None

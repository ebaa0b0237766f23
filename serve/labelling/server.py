"""ML backend for Label Studio: the calls that Label Studio makes, in front of a gateway.

Source of the calls: HumanSignal/label-studio, ``label_studio/ml/api_connector.py``, and
HumanSignal/label-studio-ml-backend, ``label_studio_ml/api.py``. Nothing is trained here: ``/train`` and ``/webhook``
are answered, and change nothing. The host and token that ``/setup`` brings are not used (`serve.labelling.images`).
"""

from __future__ import annotations

import asyncio
import base64
import hmac
import logging
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from serve import __version__
from serve.client import AsyncClient
from serve.errors import (
    BackendBroken,
    BadRequest,
    FrameTooLarge,
    ModelNotFound,
    Overloaded,
    ServeError,
    SettingsError,
    SlowRequest,
    Unauthorized,
    error_body,
    quote,
)
from serve.labelling.images import TaskImages, shown_size
from serve.labelling.label_config import Control, check_labels, read_label_config
from serve.labelling.options import LabelStudioOptions
from serve.labelling.predictions import join_predictions, make_regions

__all__ = ["create_backend"]

logger = logging.getLogger(__name__)


def create_backend(options: LabelStudioOptions) -> Starlette:
    """Create the application.

    Raises:
        SettingsError: no model is named, or a prefix is no URI.
    """
    backend = _Backend(options)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with backend.client:
            yield
        backend.images.close()

    calls = {"/setup": backend.setup, "/predict": backend.predict, "/validate": backend.validate}
    routes = [
        *(Route(path, backend.health, methods=["GET"]) for path in ("/", "/health")),
        Route("/versions", backend.versions, methods=["GET"]),
        *(Route(path, call, methods=["POST"]) for path, call in calls.items()),
        *(Route(path, backend.ignore, methods=["POST"]) for path in ("/train", "/webhook")),
    ]
    handlers = {ServeError: _answer_error, HTTPException: _answer_unknown_path}
    return Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)


@dataclass(frozen=True)
class _Image:
    """An image of a task: what names it, its number in a list, and the controls that are for it."""

    value: object
    index: int | None
    controls: Sequence[Control]


def _images_of(task: Any, controls: Sequence[Control]) -> list[_Image] | ServeError:
    """List the images of a task."""
    given = task.get("data") if isinstance(task, dict) else None
    data = given if isinstance(given, dict) else {}
    tags = dict.fromkeys(control.image for control in controls)
    images = [
        _Image(value, index if tag.is_list else None, [each for each in controls if each.image == tag])
        for tag in tags
        for index, value in enumerate(tag.find(data))
    ]
    return images or BadRequest(f"a task needs data with {' or '.join(tag.value for tag in tags)}")


class _Backend:
    def __init__(self, options: LabelStudioOptions) -> None:
        if options.model is None:
            raise SettingsError("no model is named; start the backend with --model NAME")
        self._options = options
        self._model = options.model
        self._name = f"{options.model}:{options.version}" if options.version else options.model
        self.client = AsyncClient(options.gateway_url, token=options.api_key, timeout_s=options.timeout_s)
        self.images = TaskImages(options)
        self._slots = asyncio.Semaphore(options.concurrency)
        self._held_bytes = 0  # of all requests

    async def health(self, request: Request) -> Response:
        """Answer whether this backend runs, to anyone; the gateway has its own probe."""
        return JSONResponse({"status": "UP", "model_class": "MMDet3dServe", "version": __version__})

    async def versions(self, request: Request) -> Response:
        """List the only version that this backend offers."""
        self._check(request)
        return JSONResponse({"versions": [self._name]})

    async def setup(self, request: Request) -> Response:
        """Check a project's label config, if it brings one, and name the model."""
        async with self._reading(request) as document:
            if document.get("schema"):
                await self._read_controls(document["schema"])
        return JSONResponse({"model_version": self._name})

    async def validate(self, request: Request) -> Response:
        """Check a label config."""
        async with self._reading(request) as document:
            controls = await self._read_controls(document.get("config"))
        return JSONResponse({"controls": [control.from_name for control in controls]})

    async def ignore(self, request: Request) -> Response:
        """Take an event that would train another backend."""
        async with self._reading(request):
            return JSONResponse({}, 201)

    async def predict(self, request: Request) -> Response:
        """Predict tasks; one that fails among several has no regions, and its error."""
        async with self._reading(request) as document:
            return await self._predict(document)

    async def _predict(self, document: Mapping[str, Any]) -> Response:
        controls = await self._read_controls(document.get("label_config"))
        tasks = document.get("tasks")
        if not isinstance(tasks, list) or not tasks:
            raise BadRequest("the request has no tasks")
        if len(tasks) > self._options.max_tasks:
            raise FrameTooLarge(f"the request has {len(tasks)} tasks, the limit is {self._options.max_tasks}")
        listed = [_images_of(task, controls) for task in tasks]
        count = sum(len(images) for images in listed if not isinstance(images, ServeError))
        if count > self._options.max_tasks:
            raise FrameTooLarge(
                f"the tasks have {count} images, the limit is that of tasks, {self._options.max_tasks}"
            )
        found = await asyncio.gather(*map(self._predict_task, listed))
        errors = [each for each in found if isinstance(each, ServeError)]
        if len(errors) == len(found):
            raise errors[0]
        results = [self._failed(each) if isinstance(each, ServeError) else each for each in found]
        return JSONResponse({"results": results, "model_version": self._name})

    def _failed(self, error: ServeError) -> dict[str, Any]:
        return {"model_version": self._name, "score": 0.0, "result": [], **error_body(error)}

    async def _predict_task(self, images: Sequence[_Image] | ServeError) -> dict[str, Any] | ServeError:
        """Predict the images of a task; returns the error of the first one that fails."""
        if isinstance(images, ServeError):
            return images
        found = await asyncio.gather(*map(self._predict_image, images))
        for each in found:
            if isinstance(each, ServeError):
                logger.warning("a task was not predicted: %s", each)
                return each
        return join_predictions(
            [region for each in found if isinstance(each, list) for region in each], self._name
        )

    async def _predict_image(self, image: _Image) -> list[dict[str, Any]] | ServeError:
        try:
            async with self._slots:
                content = await self.images.read(image.value)
                size = shown_size(content)
                with _own_key():
                    result = await self.client.predict(
                        content, self._model, self._options.version, score_thr=self._options.score_thr
                    )
            return await asyncio.to_thread(make_regions, result, image.controls, size, image.index)
        except ServeError as error:
            return error

    async def _read_controls(self, label_config: object) -> Sequence[Control]:
        """Read a label config, and compare it with the model's classes if the gateway can be asked for them.

        Raises:
            BadRequest: a config that no prediction can fill, or a model that is not for images.
            ModelNotFound: the gateway has no such model.
            BackendBroken: it refuses the key.
        """
        controls = read_label_config(label_config)
        try:
            with _own_key():
                model = await self.client.describe(self._model, self._options.version) or {}
        except (ModelNotFound, BackendBroken):
            raise
        except ServeError as error:
            logger.warning("the labels are not compared with the classes of %s: %s", self._name, error)
        else:
            modality = model.get("modality") or "image"
            if modality != "image":
                raise BadRequest(
                    f"model {self._name} takes {modality} frames; start this backend with one for images"
                )
            check_labels(controls, model.get("classes") or (), self._name)
        return controls

    @asynccontextmanager
    async def _reading(self, request: Request) -> AsyncIterator[Mapping[str, Any]]:
        """Read the JSON of a request; its bytes are counted until the block ends.

        Raises:
            Unauthorized: it has not the agreed user and password.
            BadRequest: it is no JSON object, or of another media type. Pages of other sites can send those to a backend
                on the user's own machine without its consent; browsers ask it before they send JSON.
            FrameTooLarge: it is over ``max_request_bytes``.
            Overloaded: all requests together are over ``max_pending_bytes``.
            SlowRequest: it has not arrived after ``body_timeout_s``.
        """
        self._check(request)
        media_type = request.headers.get("content-type", "")
        if media_type.partition(";")[0].strip().lower() != "application/json":
            raise BadRequest(f"the Content-Type must be application/json, not {quote(media_type)}")
        body = bytearray()
        try:
            await self._receive(request, body)
            try:
                document = orjson.loads(body)
            except orjson.JSONDecodeError as error:
                raise BadRequest(f"the request is not JSON: {error}") from None
            if not isinstance(document, dict):
                raise BadRequest("the request must be an object")
            yield document
        finally:
            self._held_bytes -= len(body)

    async def _receive(self, request: Request, body: bytearray) -> None:
        """Append to `body` what arrives, within the limits."""
        options = self._options
        try:
            async with asyncio.timeout(options.body_timeout_s):
                async for piece in request.stream():
                    body += piece
                    self._held_bytes += len(piece)
                    if len(body) > options.max_request_bytes:
                        raise FrameTooLarge(
                            f"the request is over {options.max_request_bytes} bytes; raise --max-request-bytes"
                        )
                    if self._held_bytes > options.max_pending_bytes:
                        raise Overloaded(
                            f"all requests together are over {options.max_pending_bytes} bytes; send fewer at a "
                            "time, or raise --max-pending-bytes"
                        )
        except TimeoutError:
            raise SlowRequest(f"the request did not arrive within {options.body_timeout_s:g} s") from None

    def _check(self, request: Request) -> None:
        """Reject a request without the agreed user and password."""
        if self._options.basic_auth is None:
            return
        expected = base64.b64encode(self._options.basic_auth.encode())
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "basic" or not hmac.compare_digest(given.strip().encode(), expected):
            raise Unauthorized(
                "wrong or missing user and password; set them for this backend in Label Studio"
            )


@contextmanager
def _own_key() -> Iterator[None]:
    """Keep the gateway's 401 apart from that of this backend, whose user and password Label Studio has."""
    try:
        yield
    except Unauthorized as error:
        raise BackendBroken(
            f"the gateway refuses this backend ({error}); start it with MMDET3D_SERVE_LABEL_STUDIO_API_KEY"
        ) from error


async def _answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServeError)
    headers = {Unauthorized: {"www-authenticate": "Basic"}, Overloaded: {"retry-after": "1"}}.get(type(error))
    return JSONResponse(error_body(error), error.status, headers)


async def _answer_unknown_path(request: Request, error: Exception) -> Response:
    """Answer an unknown path or method."""
    assert isinstance(error, HTTPException)
    mapped = BadRequest(f"{request.method} {request.url.path}: {error.detail}")
    return JSONResponse(error_body(mapped), error.status_code, error.headers)

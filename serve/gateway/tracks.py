"""Tracks over HTTP: the sequences that clients have open, within bounds, each in the order of its requests.

A request names its sequence with ``track_session`` and opens it with ``track_start``, as requests of Triton's sequence
batching do. A session that is not open is an error rather than a new one: ids that begin at 1 again, after a restart or
a pause, would pass for the objects of before.
"""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from types import TracebackType
from typing import Self

from serve.errors import (
    BadRequest,
    DeadlineExceeded,
    Overloaded,
    ServeError,
    SessionNotFound,
    UnknownOption,
    quote,
)
from serve.gateway.backend import Answer
from serve.gateway.dispatch import Outcome
from serve.gateway.options import GatewayOptions
from serve.gateway.response import read_document
from serve.protocol.option_places import TRACK_OPTIONS
from serve.protocol.worker import EncodedFrame
from serve.tracking import Tracker, TrackOptions, track_answer

__all__ = ["SessionKey", "Track", "TrackRequest", "TrackSessions", "parse_track_request"]

_HEADERS = {"x-" + name.replace("_", "-"): name for name in TRACK_OPTIONS}
_NAME = re.compile(r"[A-Za-z0-9._:-]{1,64}")
_QUICK_BYTES = 8 * 1024  # some fifty boxes, which are followed in 2 ms
_LEAST_UNIX_MS = 1e11  # the year 5138 in seconds, 1973 in milliseconds
_FLAGS = {"true": True, "1": True, "false": False, "0": False}


@dataclass(frozen=True)
class TrackRequest:
    """What a request asks of its sequence.

    Attributes:
        session: name of the sequence, chosen by the client.
        start: begin it, anew if it is open.
        end: close it after this request.
        times_s: time of each frame, seconds from any origin; None for one period of the rate after each other.
    """

    session: str
    start: bool = False
    end: bool = False
    times_s: tuple[float, ...] | None = None


@dataclass(frozen=True)
class SessionKey:
    """Whose sequence it is: another client's, model's or version's session of the same name is another one."""

    client: str
    model: str
    version: str
    session: str


def parse_track_request(
    query: Mapping[str, str], headers: Mapping[str, str]
) -> tuple[TrackRequest | None, dict[str, str]]:
    """Take the options of tracks out of a query and of ``X-`` headers; the query takes precedence.

    Returns:
        What is asked, None for no tracks; and the rest of the query.

    Raises:
        UnknownOption: an invalid value, or an option without ``track_session``.
    """
    # One pass over the headers: every request pays for it, few have one of these.
    given = {_HEADERS[header]: headers[header] for header in _HEADERS.keys() & headers.keys()}
    given |= {name: value for name, value in query.items() if name in TRACK_OPTIONS}
    rest = {name: value for name, value in query.items() if name not in TRACK_OPTIONS}
    if not given:
        return None, rest
    session = given.get("track_session")
    if session is None:
        raise UnknownOption(f"{next(iter(given))} is about a sequence; name it with track_session")
    if not _NAME.fullmatch(session):
        raise UnknownOption(
            f"track_session must be 1 to 64 letters, digits, '.', '_', ':' or '-', got {quote(session)}"
        )
    times = given.get("frame_time_s")
    return (
        TrackRequest(
            session,
            _flag("track_start", given.get("track_start", "false")),
            _flag("track_end", given.get("track_end", "false")),
            None if times is None else _times(times),
        ),
        rest,
    )


def _flag(name: str, text: str) -> bool:
    if text.lower() not in _FLAGS:
        raise UnknownOption(f"{name} must be true or false, got {quote(text)}")
    return _FLAGS[text.lower()]


def _times(text: str) -> tuple[float, ...]:
    try:
        times = tuple(float(part) for part in text.split(","))
    except ValueError:
        times = (math.nan,)
    if not all(map(math.isfinite, times)) or any(a >= b for a, b in pairwise(times)):
        raise UnknownOption(
            f"frame_time_s must be seconds, rising, one per frame, such as 12.3,12.4; got {quote(text)}"
        )
    if max(map(abs, times)) >= _LEAST_UNIX_MS:
        raise UnknownOption(
            f"frame_time_s must be seconds, and {quote(text)} is a Unix time in milliseconds, microseconds or "
            "nanoseconds; divide it by 1e3, 1e6 or 1e9"
        )
    return times


@dataclass(eq=False)
class _Session:
    tracker: Tracker
    used: float
    waiting: deque[Track] = field(default_factory=deque)
    turn: asyncio.Event = field(default_factory=asyncio.Event)
    timed: bool | None = None

    @property
    def last_time_s(self) -> float:
        """Latest time that was followed or waits; not that of a request that failed, which may be sent again."""
        times = [track.wanted.times_s[-1] for track in self.waiting if track.wanted.times_s]
        return max(-math.inf if self.tracker.time_s is None else self.tracker.time_s, *times, -math.inf)


class TrackSessions:
    """The open sequences of one gateway process."""

    def __init__(
        self,
        options: GatewayOptions,
        *,
        is_only_process: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take the bounds from `options`; `is_only_process` unless several gateways share the port."""
        self._options, self._is_only_process, self._clock = options, is_only_process, clock
        self._sessions: dict[SessionKey, _Session] = {}
        self.expired = 0

    def __len__(self) -> int:
        """Return the number of open sequences."""
        self._expire()
        return len(self._sessions)

    @property
    def tracks(self) -> int:
        """Number of tracks of all open sequences."""
        return sum(len(session.tracker) for session in self._sessions.values())

    def count(self, model: str, version: str) -> int:
        """Return the number of open sequences of a version of a model."""
        self._expire()
        return sum(key.model == model and key.version == version for key in self._sessions)

    def find_version(self, client: str, model: str, session: str) -> str | None:
        """Return the version that an open sequence belongs to, of several the one used last; None if none is open."""
        self._expire()
        found = [
            (each.used, key.version)
            for key, each in self._sessions.items()
            if (key.client, key.model, key.session) == (client, model, session)
        ]
        return max(found)[1] if found else None

    def enter(self, key: SessionKey, wanted: TrackRequest) -> Track:
        """Take the next place in the order of a sequence.

        Raises:
            SessionNotFound: it is not open.
            Overloaded: it would be one too many.
            BadRequest: its times are not after those of the request before, or several processes share the port.
            MissingPackage: scipy is not installed.
        """
        if not self._is_only_process:
            raise BadRequest(
                "track_session: this port is served by several gateway processes, which share no tracks; "
                "start the server with --gateways 1, or track in the client (mmdet3d-serve predict --track --url …)"
            )
        self._expire()
        if wanted.start:
            session = self._open(key)
        elif key in self._sessions:
            session = self._sessions[key]
        else:
            raise SessionNotFound(
                f"no track session '{key.session}' of model '{key.model}', version {key.version}, is open here: it "
                f"was never started, was idle for {self._options.track_idle_s:g} s, or the server was restarted; send "
                "track_start=true, after which ids begin at 1"
            )
        self._check_times(session, wanted)
        track = Track(self, key, session, wanted)
        session.waiting.append(track)
        return track

    def _open(self, key: SessionKey) -> _Session:
        if not self._options.track_sessions:
            raise BadRequest("this server keeps no track sessions (track_sessions=0); track in the client")
        if key not in self._sessions:
            limit = self._options.track_sessions
            share = math.ceil(limit * self._options.client_share)
            own = sum(each.client == key.client for each in self._sessions)
            if len(self._sessions) >= limit or own >= share:
                raise Overloaded(
                    f"{own} track sessions of this client and {len(self._sessions)} in total are open, the limits are "
                    f"{share} and {limit}; close one with track_end=true, or wait until one has been idle for "
                    f"{self._options.track_idle_s:g} s"
                )
        tracker = Tracker(TrackOptions(max_tracks=self._options.tracks_per_session))
        self._sessions[key] = session = _Session(tracker, self._clock())
        return session

    def _check_times(self, session: _Session, wanted: TrackRequest) -> None:
        timed = wanted.times_s is not None
        if session.timed not in (None, timed):
            raise BadRequest(
                "frame_time_s is missing here and was given before; send it with every request of a session or with "
                "none"
                if session.timed
                else "frame_time_s was not given with the request before; send it with every request of a session or "
                "with none"
            )
        if wanted.times_s is not None and wanted.times_s[0] <= (last_s := session.last_time_s):
            raise BadRequest(
                f"frame_time_s {wanted.times_s[0]:.15g} is not after {last_s:.15g}, that of the request before; send "
                "the frames of a session in order, each once"
            )
        session.timed = timed

    def _leave(self, track: Track) -> None:
        session = track.session
        session.waiting.remove(track)
        session.used = self._clock()
        session.turn.set()  # each that waits looks whether it is the first now
        session.turn = asyncio.Event()
        if track.wanted.end and self._sessions.get(track.key) is session:
            del self._sessions[track.key]

    def _expire(self) -> None:
        oldest = self._clock() - self._options.track_idle_s
        for key in [key for key, each in self._sessions.items() if not each.waiting and each.used < oldest]:
            del self._sessions[key]
            self.expired += 1


@dataclass(eq=False)
class Track:
    """Place of one request in the order of its sequence; a context manager that gives it up."""

    sessions: TrackSessions
    key: SessionKey
    session: _Session
    wanted: TrackRequest

    def __enter__(self) -> Self:
        """Hold the place within the block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let the next request have its turn."""
        self.sessions._leave(self)

    def check(self, frames: Sequence[EncodedFrame | ServeError]) -> None:
        """Check that there is a time for each frame, and that the answers will have boxes.

        Raises:
            BadRequest: not as many times as frames.
            UnknownOption: a frame leaves out fields that tracks are made of.
        """
        times = self.wanted.times_s
        if times is not None and len(times) != len(frames):
            raise BadRequest(
                f"frame_time_s has {len(times)} times, and the request has {len(frames)} frames; send one per frame"
            )
        if any(isinstance(frame, EncodedFrame) and frame.options.fields is not None for frame in frames):
            raise UnknownOption("track_session needs boxes, scores and labels; leave fields out")

    async def follow(self, outcomes: Sequence[Outcome], deadline: float) -> list[Outcome]:
        """Give the detections of all frames of the request their ids, once the requests before it have theirs.

        A frame that failed has no ids, and stays an error.

        Args:
            outcomes: of the frames, in order.
            deadline: end of the wait for the requests before, a time of `time.perf_counter`.

        Raises:
            DeadlineExceeded: a request before it took longer.
        """
        times = self.wanted.times_s
        try:
            async with asyncio.timeout(max(deadline - time.perf_counter(), 0)):
                while self.session.waiting[0] is not self:
                    await self.session.turn.wait()
        except TimeoutError:
            raise DeadlineExceeded(
                f"an earlier request of track session '{self.key.session}' took too long; raise timeout_ms, or send "
                "fewer at a time"
            ) from None
        return [
            await self._follow(outcome, None if times is None else times[k])
            for k, outcome in enumerate(outcomes)
        ]

    async def _follow(self, outcome: Outcome, time_s: float | None) -> Outcome:
        if isinstance(outcome, ServeError):
            self.session.tracker.skip()
            return outcome
        encoded = bytes(outcome.value.body)
        try:
            # The first frame of images imports their tracker, 0.2 s.
            if len(encoded) > _QUICK_BYTES or not self.session.tracker.frames:
                tracked = await asyncio.to_thread(self._track, encoded, time_s)
            else:
                tracked = self._track(encoded, time_s)
        except ServeError as error:
            return error
        return replace(outcome, value=Answer(tracked, outcome.value.seconds))

    def _track(self, encoded: bytes, time_s: float | None) -> bytes:
        tracker = self.session.tracker
        more = {"track_session": self.key.session, "track_frame": tracker.frames}
        return track_answer(tracker, read_document(encoded), encoded, time_s, more).encoded

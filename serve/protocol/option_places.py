"""Where options travel: what the error of an unknown option says about one that belongs elsewhere.

A frame has its own options (`serve.protocol.options.FrameOptions`), in a form, in JSON, or with all frames of a request
in the query and in headers. A request has some as a whole, which its body cannot name, because they are needed before
it is read.
"""

from __future__ import annotations

from collections.abc import Iterable

from serve.errors import UnknownOption, quote

__all__ = ["REQUEST_OPTIONS", "TRACK_OPTIONS", "unknown_option"]

#: Options of a request as a whole: its deadline, and the camera of its frames.
REQUEST_OPTIONS = ("timeout_ms", "camera")
#: Options of a request that concern its sequence.
TRACK_OPTIONS = ("track_session", "track_start", "track_end", "frame_time_s")
_OF_REQUEST = frozenset((*REQUEST_OPTIONS, *TRACK_OPTIONS))
# What clients take for options and is none: where it belongs.
_PLACES = {
    **dict.fromkeys(("b64", "uri", "frames"), "it is a member of a JSON body"),
    **dict.fromkeys(("model", "version"), "it is in the path, /predictions/MODEL/VERSION"),
    **dict.fromkeys(("accept", "format"), "the form of an answer is named by the header Accept"),
    **dict.fromkeys(("token", "api_key", "key"), "a key is sent as the header Authorization: Bearer KEY"),
}


def unknown_option(name: str, known: Iterable[str], others: Iterable[str] = ()) -> UnknownOption:
    """Return the error of an option that is not known in its place.

    Args:
        name: the option.
        known: names of the options of a frame.
        others: names of further options that may be in this place.
    """
    names = ", ".join((*others, *sorted(known)))
    if name in _OF_REQUEST and name not in others:
        header = f"X-{name.replace('_', '-').title()}"
        return UnknownOption(
            f"option {name} is that of a request to the gateway, not of a frame; send it in the query (?{name}=…) or "
            f"as the header {header}; known here: {names}"
        )
    if name in _PLACES:
        return UnknownOption(f"{name} is no option: {_PLACES[name]}; known: {names}")
    return UnknownOption(f"unknown option {quote(name)}; known: {names}")

"""Names of variables: prefix, former names, names that Kubernetes adds, and the closest name to a wrong one."""

from __future__ import annotations

import difflib
import functools
import logging
import re
from collections.abc import Mapping
from typing import NamedTuple

__all__ = ["PREFIX", "RENAMED", "SCOPES", "Renamed", "did_you_mean", "is_service_link", "warn_renamed"]

PREFIX = "MMDET3D_SERVE_"
# Scopes of the classes of options that have variables: each of these classes answers for the names in its scope.
SCOPES = ("gateway_", "label_studio_")
logger = logging.getLogger(__name__)

_SERVICE_LINK = re.compile(
    r"(\w+_)?(service_host|service_port(_\w+)?|port_\d+_(tcp|udp|sctp)(_(proto|port|addr))?)"
)


class Renamed(NamedTuple):
    """What an option is called now; values of the old one are multiplied by `factor`."""

    name: str
    factor: int = 1


# Former names, understood until 0.3 with a warning; a name is the class's scope and the field's name.
RENAMED = {
    "keep_memory": Renamed("keep_heap"),
    "gateway_max_frame_bytes": Renamed("max_frame_bytes"),
    "gateway_batches_ahead": Renamed("gateway_prefetch_batches"),
    "gateway_early_s": Renamed("gateway_lead_time_s"),
    "gateway_receive_timeout_s": Renamed("gateway_body_timeout_s"),
    "gateway_head_timeout_s": Renamed("gateway_header_timeout_s"),
    "gateway_connection_requests": Renamed("gateway_max_requests_per_connection"),
    "gateway_stall_s": Renamed("gateway_stall_timeout_s"),
    "gateway_linger_s": Renamed("gateway_shutdown_delay_s"),
    "gateway_drain_s": Renamed("gateway_graceful_timeout_s"),
    "torchserve_max_request_mib": Renamed("torchserve_max_request_bytes", 1 << 20),
    "torchserve_response_timeout": Renamed("torchserve_response_timeout_s"),
    "torchserve_startup_timeout": Renamed("torchserve_startup_timeout_s"),
    "torchserve_java_option": Renamed("torchserve_java_options"),
}


@functools.cache
def warn_renamed(old: str, new: str) -> None:
    """Log once per process that an option has another name now."""
    logger.warning("warning: %s is now %s; the old name will be removed in 0.3", old, new)


def did_you_mean(name: str, known: Mapping[str, str]) -> str:
    """Hint to follow "unknown setting NAME", from the scoped names that are known."""
    now = {old: new.name for old, new in RENAMED.items() if new.name in known} | {
        each: each for each in known
    }
    if close := difflib.get_close_matches(name, now, n=1):
        return f"; did you mean {PREFIX}{now[close[0]].upper()}?"
    return (
        f"; known: {', '.join(f'{PREFIX}{each.upper()}' for each in sorted(known))}"
        if len(known) < 20
        else "; docs/settings.md lists what there is"
    )


def is_service_link(name: str, text: str) -> bool:
    """Whether Kubernetes put it there for a Service called mmdet3d-serve or mmdet3d-serve-something.

    Every pod of a namespace gets such variables unless its ``enableServiceLinks`` is false.
    """
    if _SERVICE_LINK.fullmatch(name):
        return True
    # The gateway's own port is a number; Kubernetes' is tcp://10.0.0.1:8000.
    return name.endswith("port") and "://" in text

"""The hub: whether it can be reached, and what its transport raises."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError

TRANSPORT_ERRORS: tuple[type[Exception], ...] = (
    HfHubHTTPError,
    *(
        kind
        for kind in HfHubHTTPError.__mro__
        if kind.__module__.partition(".")[0] not in ("huggingface_hub", "builtins")
    ),
)
"""The hub's answers and what its transport raises, whichever library that is: a line that breaks is
no OSError in all of them."""
TIMEOUT = 10.0
"""Seconds to wait for a connection."""


def unreachable() -> str | None:
    """Why the hub cannot be reached, or None where it can.

    huggingface_hub itself tries for a minute before it says so. Where there is a proxy, only that
    knows: then the answer is None.
    """
    if constants.HF_HUB_OFFLINE:
        return "offline mode is on (HF_HUB_OFFLINE)"
    address = urlsplit(constants.ENDPOINT)
    if address.hostname is None:
        return f"{address.geturl()!r} is no address (HF_ENDPOINT)"
    if getproxies():
        return None
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((address.hostname, port), timeout=TIMEOUT).close()
    except OSError as error:
        return f"{address.hostname}: {error.strerror or error}"
    return None

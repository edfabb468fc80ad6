"""Whether the hub can be reached."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants

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

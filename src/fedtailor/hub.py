"""The model and data hub: asked where it can be reached, else only its cache on this machine."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies


@contextmanager
def as_reachable(name: str) -> Iterator[None]:
    """For loading what has this name. Without a network the hub's client would retry for a minute; said to be offline it looks into its
    cache at once. For a folder here nobody is asked."""
    if Path(name).is_dir():
        yield
        return
    import datasets.config
    from huggingface_hub import constants

    known = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = known[0] or not reachable(constants.ENDPOINT)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = known


def reachable(address: str) -> bool:
    """Whether the name of this address is known here."""
    if getproxies():  # a proxy looks names up itself
        return True
    try:
        return bool(socket.getaddrinfo(urlsplit(address).hostname, 443))
    except OSError:
        return False

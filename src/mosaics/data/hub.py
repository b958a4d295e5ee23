"""What comes from the Hugging Face hub."""

import socket
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit


def where_to_look() -> dict[str, Any]:
    """How a file is asked for by its name on the hub: from the cache alone if the hub's address can't even be found.

    The client would otherwise try six times for each file, which takes a minute to say that a name is misspelt.
    """
    from huggingface_hub import constants

    host = urlsplit(constants.ENDPOINT).hostname
    if constants.HF_HUB_OFFLINE or not host or urllib.request.getproxies():
        return {}
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return {"local_files_only": True}
    return {}


@contextmanager
def no_waiting() -> Iterator[None]:
    """`datasets` takes no such argument: while this lasts, what is out of reach is looked for in the cache alone."""
    import datasets
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    if where_to_look():
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before

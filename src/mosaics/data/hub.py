"""What comes from the Hugging Face hub."""

import socket
import urllib.request
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

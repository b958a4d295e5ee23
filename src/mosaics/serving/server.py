"""The server process: its socket, its signals, its end."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Mapping
from pathlib import Path

import uvicorn

from mosaics.models.cache import release
from mosaics.models.memory_file import load_memory
from mosaics.serving.app import LOCAL, build_app
from mosaics.serving.desk import Desk
from mosaics.serving.memories import Kept

CONNECTIONS = 512


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens; clients that come before the server is ready wait.

    Raises:
        OSError: the address is not this machine's, or the port is taken or may not be used.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address, family=family)
    except OSError as error:
        why = error.strerror or str(error)
        raise OSError(f"can't listen on {host}, port {port} ({why}); choose another --port or --host") from None


def take_up(desk: Desk, files: Mapping[str, Path]) -> None:
    """Load memories that stay as long as the server runs, by their ids.

    Raises:
        ValueError: one is damaged, another model's, or there is no room.
        OSError: one can't be read.
    """
    for id, file in files.items():
        cache, ids = load_memory(file, desk.model)
        keep(desk, f"--memory {id}", Kept(id, cache, ids.shape[1], given=True))


def keep(desk: Desk, what: str, kept: Kept) -> None:
    """Let a memory stay as long as the server runs.

    Raises:
        ValueError: there is no room; `what` says in the message which memory it is.
    """
    release(kept.cache)
    try:
        desk.memories.add(kept)
    except ValueError as error:
        raise ValueError(f"{what}: {error}; let more be kept with --memory-bytes or --memories") from None


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, desk: Desk, grace: float) -> None:
        super().__init__(config)
        self.desk, self.grace = desk, grace

    def handle_exit(self, sig: int, frame) -> None:
        self.desk.engine.close(self.grace)
        super().handle_exit(sig, frame)


def run(desk: Desk, listening: socket.socket, grace: float = 10.0) -> None:
    """Serve until SIGINT or SIGTERM; then take nothing new, and let what is under way end within `grace` seconds.

    `MOSAICS_API_KEY` is what clients have to send, where it is set.
    """
    host = listening.getsockname()[0]
    local = LOCAL if host in LOCAL else None
    app = build_app(desk, local, os.environ.get("MOSAICS_API_KEY") or None)
    config = uvicorn.Config(
        app,
        lifespan="off",
        ws="none",
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=CONNECTIONS,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=int(grace) + 5,
    )
    for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn raises again what it has dealt with
        signal.signal(number, lambda *_: None)
    _Server(config, desk, grace).run(sockets=[listening])
    desk.engine.join()

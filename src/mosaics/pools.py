"""Processes of a pool end with the process that started them."""

import multiprocessing
import os
from multiprocessing.connection import wait
from threading import Thread


def end_with_parent() -> None:
    """To be called first in a process of a pool: when its parent is gone, even killed, the process ends at once.

    Otherwise it would finish its task, which may be hours of training that another process has begun meanwhile.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        Thread(target=_end_after, args=(parent.sentinel,), daemon=True).start()


def _end_after(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)

"""No process of a pool outlives the one that started it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mosaics import pools
from mosaics.experiments import studies
from mosaics.library import library

# Its first process waits for a task that never ends; then the parent is killed.
PARENT = """
import os, signal, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from pools import end_with_parent  # not through the package, which would import torch

if __name__ == "__main__":
    pool = ProcessPoolExecutor(1, get_context("spawn"), end_with_parent)
    print(pool.submit(os.getpid).result(), flush=True)
    pool.submit(time.sleep, 25)
    time.sleep(0.2)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_a_process_of_a_pool_ends_with_its_parent(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    path = os.environ | {"PYTHONPATH": str(Path(pools.__file__).parent)}
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=path) as parent:
        pid, until = int(parent.stdout.readline()), time.monotonic() + 20
        while is_there(pid) and time.monotonic() < until:
            time.sleep(0.05)
        if is_there(pid):
            os.kill(pid, signal.SIGKILL)
            pytest.fail("the process lives on without its parent")


def test_all_pools_end_with_their_parent(monkeypatch, tmp_path):
    called = []
    for module in (studies, library):
        monkeypatch.setattr(module, "end_with_parent", lambda: called.append(1))
    monkeypatch.setattr(studies.signal, "signal", lambda *_: None)
    threads = library.torch.get_num_threads()
    studies.use_threads(threads)
    library._begin(lambda: None, tmp_path, threads)
    assert called == [1, 1]

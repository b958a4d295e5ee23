"""Measuring on this machine: seconds of functions in turn, peak memory in a process of its own, what the machine can do
at most, and whether others use it meanwhile."""

from __future__ import annotations

import math
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mosaics.experiments.studies import use_threads
from mosaics.experiments.trainings import say

if TYPE_CHECKING:
    import torch

SHORTEST = 0.1  # seconds of one sample, where no number of calls is given: what is shorter is repeated
LIMITS = {"cpu": (2048, 2**28), "mps": (4096, 2**29), "cuda": (8192, 2**30)}  # width of the matrices, bytes of the copy
LOUD = 0.1  # cores that others may use


def paired(
    runs: dict[str, Callable[[], Any]], rounds: int, device: torch.device, calls: int | None = None
) -> dict[str, list[float]]:
    """Seconds of a call of each function, one after the other in every round.

    Args:
        runs: functions that have been called before.
        rounds: samples of each.
        device: is waited for.
        calls: in a sample; None: as many as take `SHORTEST` seconds.
    """
    counts = {name: calls or math.ceil(SHORTEST / _seconds(run, 1, device)) for name, run in runs.items()}
    if calls:
        for name, run in runs.items():
            _seconds(run, counts[name], device)
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            samples[name].append(_seconds(run, counts[name], device))
    return samples


def _seconds(run: Callable[[], Any], calls: int, device: torch.device) -> float:
    import torch

    wait = getattr(torch, device.type).synchronize
    wait()
    began = time.perf_counter()
    for _ in range(calls):
        run()
    wait()
    return (time.perf_counter() - began) / calls


def limits(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """What the machine can do: the best of a few large matrix products, and of a few large copies (read and written
    bytes)."""
    import torch

    n, count = LIMITS[device.type]
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    source = torch.ones(count, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    found = []
    for run in (lambda: torch.mm(a, b), lambda: target.copy_(source)):
        run()
        found.append(min(_seconds(run, 1, device) for _ in range(5)))
    return {"flops_per_second": 2 * n**3 / found[0], "bytes_per_second": 2 * count / found[1]}


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a fresh process whose C library gives blocks of 64 KiB and more back when they are freed."""
    import torch

    context, name = multiprocessing.get_context("spawn"), "MALLOC_MMAP_THRESHOLD_"
    before = os.environ.get(name)
    os.environ[name] = str(2**16)
    try:
        with ProcessPoolExecutor(1, context, use_threads, (torch.get_num_threads(),)) as pool:
            return pool.submit(function, *arguments).result()
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def resident(field: str) -> int | None:
    """Bytes of resident memory, now (`VmRSS`) or at most (`VmHWM`); None where Linux does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), None)


def forget_peak() -> None:
    """Begin to look for the highest resident memory anew."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def others() -> float | None:
    """Seconds of all cores that other processes, or other guests of the machine, have used; None where Linux does not
    tell."""
    try:
        ticks = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    except OSError:
        return None
    own = os.times()
    used = sum(int(ticks[i]) for i in (0, 1, 2, 5, 6, 7)) / os.sysconf("SC_CLK_TCK")
    return used - own.user - own.system


def warn_if_loud() -> None:
    """Say it if other processes use more than `LOUD` cores now."""
    before = others()
    if before is None:
        return
    time.sleep(0.5)
    cores = (others() - before) / 0.5
    if cores > LOUD:
        say(f"warning: other processes use {cores:.1f} cores; times will be off, and ratios less so")

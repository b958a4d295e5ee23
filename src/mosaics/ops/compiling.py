"""C++ that is compiled for this processor when it is first wanted, and kept for later."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from ctypes import c_int64, c_void_p
from pathlib import Path

from torch import Tensor

logger = logging.getLogger(__name__)
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-fopenmp", "-shared")
LIBRARIES = ("-nodefaultlibs", "-lstdc++", "-lm", "-lc")


@functools.cache
def library(source: Path) -> ctypes.CDLL | None:
    """The shared library of a C++ file; None, with the reason in the log, where it can't be made.

    The compiler is `$CXX`, or else `c++`; `MOSAICS_COMPILE=0` forbids it. Libraries are kept in `$MOSAICS_CACHE`, or
    else in `mosaics` under the user's cache folder, a file for each source, compiler and processor. OpenMP is not
    linked: the one that torch has loaded is used, so that both share their threads.
    """
    if os.environ.get("MOSAICS_COMPILE") == "0":
        return None
    compiler = shutil.which(os.environ.get("CXX") or "c++")
    if compiler is None:
        logger.info("%s is not compiled: there is no C++ compiler; slower forms are used", source.name)
        return None
    try:
        version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
        about = [source.read_bytes(), version, " ".join(FLAGS + LIBRARIES).encode(), _processor()]
        name = f"{source.stem}-{hashlib.sha256(b'|'.join(about)).hexdigest()[:16]}.so"
        folder = _folder()
        if not (folder / name).exists():
            logger.info("compiling %s for this processor, once", source.name)
            with tempfile.TemporaryDirectory(dir=folder) as scratch:  # another process may do the same
                made = Path(scratch) / name
                subprocess.run(
                    [compiler, *FLAGS, str(source), "-o", str(made), *LIBRARIES], capture_output=True, check=True
                )
                os.replace(made, folder / name)
        return ctypes.CDLL(str(folder / name))
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:  # RuntimeError: there is no home
        reason = getattr(error, "stderr", None) or str(error).encode()
        logger.info(
            "%s is not compiled; slower forms are used: %s", source.name, reason.decode(errors="replace")[-500:]
        )
        return None


def _folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get("MOSAICS_CACHE") or Path(cache) / "mosaics")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _processor() -> bytes:
    """What tells processors apart that need different code."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.system()} {platform.machine()} {platform.processor()} {features}".encode()


def dense(x: Tensor) -> Tensor:
    """`x` with the entries of a vector, its last dimension, side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def strided(*tensors: Tensor) -> list[ctypes.c_void_p | ctypes.Array]:
    """Arguments for a function of a library: the address of each tensor and the strides of its first three
    dimensions."""
    return [x for t in tensors for x in (c_void_p(t.data_ptr()), (c_int64 * 3)(*t.stride()[:3]))]


def plain(*tensors: Tensor | None) -> list[ctypes.c_void_p]:
    """Arguments for a function of a library: the address of each tensor, which is contiguous; null for None."""
    return [c_void_p(None if t is None else t.data_ptr()) for t in tensors]

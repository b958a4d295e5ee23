"""C++ that is compiled for this processor when it is first wanted, and kept for later."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import re
import shlex
import shutil
import stat
import subprocess
import tempfile
import time
from ctypes import c_int64, c_void_p
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mosaics.ops import has_numbers

logger = logging.getLogger(__name__)
ROOT = Path(__file__).parents[2]  # whence other packages include ours: "mosaics/memories/contract/one_token.h"
ABOUT = Path(__file__).with_name("about.cpp")  # is compiled with every source
SCRATCH = "making-"  # begins the name of a folder in which something is compiled
ABANDONED = 3600  # seconds after which nobody compiles in it any more
INTEL = ("x86_64", "amd64", "i386", "i686")  # whose compilers take -march=native, others -mcpu=native
_told: list[str] = []
_about: dict[Path, str] = {}


class Way(NamedTuple):
    """How a library may be made.

    Attributes:
        options: before the source.
        libraries: after it.
        without: what it goes without.
    """

    options: tuple[str, ...]
    libraries: tuple[str, ...]
    without: str


def ways(system: str, machine: str) -> list[Way]:
    """Ways to make a library on a machine, as `platform` names both, the fastest first.

    OpenMP is not linked: the one that torch has loaded is used, so that both share their threads. Where that can't be
    (LLVM's compiler wants another OpenMP than GNU's, and Apple's brings none), loading fails and the next way is taken.
    """
    native = "-march=native" if machine.lower() in INTEL else "-mcpu=native"
    plain, one = ("-O3", "-std=c++17", "-fPIC"), ("-fopenmp-simd",)
    if system == "Darwin":
        shared: tuple[str, ...] = ("-dynamiclib", "-undefined", "dynamic_lookup")
        threads, libraries = ("-Xpreprocessor", "-fopenmp"), ()
    else:
        shared, threads = ("-shared",), ("-fopenmp",)
        libraries = ("-nodefaultlibs", "-lstdc++", "-lm", "-lc", "-lgcc")
    found = [
        Way((*plain, *tuned, *openmp, *shared), libraries, " and ".join(filter(None, (lost, untuned))))
        for tuned, untuned in (((native,), ""), ((), native))
        for openmp, lost in ((threads, ""), (one, "OpenMP"))
    ]
    return [*found, Way((*plain, *shared), (), f"OpenMP and {native}")]


@functools.cache
def library(source: Path) -> ctypes.CDLL | None:
    """The shared library of a C++ file; None where it can't be made: the first time a warning says why.

    The compiler is `$CXX`, which may have options, or else `c++`; `MOSAICS_CXXFLAGS` adds options after our own, and
    `MOSAICS_COMPILE=0` forbids it all. What a compiler refuses of our options (OpenMP, code for just this processor) is
    left out, and a warning says so. Libraries are kept in `$MOSAICS_CACHE`, or else in `mosaics` under the user's cache
    folder, a file for each source, compiler and processor. Others must not be able to write there. The file's name ends
    with the SHA-256 of what is in it: what does not fit it, or can't be loaded, is made again.
    """
    if os.environ.get("MOSAICS_COMPILE") == "0":
        _about[source] = "MOSAICS_COMPILE=0 forbids to compile; unset it for the faster forms"
        return None
    try:
        command = compiler()
        version = subprocess.run([*command, "--version"], capture_output=True, check=True).stdout
        more = shlex.split(os.environ.get("MOSAICS_CXXFLAGS", ""))
        possible = ways(platform.system(), platform.machine())
        commands = [
            [*command, *way.options, f"-I{ROOT}", *more, str(source), str(ABOUT), *way.libraries] for way in possible
        ]
        words = [shlex.join([*command, *way.options, *more, *way.libraries]) for way in possible]
        about = [*_texts(source), ABOUT.read_bytes(), version, "\n".join(words).encode(), _processor()]
        name = f"{source.stem}-{hashlib.sha256(b'|'.join(about)).hexdigest()[:16]}"
        folder = _folder()
        for path in folder.glob(f"{name}-*.so"):
            with contextlib.suppress(OSError):
                if _is_ours(path.lstat()) and path.stem == f"{name}-{_digest(path)}":
                    return _introduced(ctypes.CDLL(str(path)), source)
            logger.info("%s is damaged, or not ours, and is made again", path)
            path.unlink(missing_ok=True)
        logger.info("compiling %s for this processor, once", source.name)
        return _introduced(_made(source, commands, possible, folder, name), source)
    except (OSError, RuntimeError, ValueError, subprocess.CalledProcessError) as error:
        # RuntimeError: there is no home; ValueError: half a quotation in `$CXX`.
        reason = _about[source] = _line(error)
        _tell(
            f"{_short(source)} is not compiled, so slower forms are used (MOSAICS_COMPILE=0 accepts that): {reason}",
        )
        return None


def _texts(source: Path) -> list[bytes]:
    """Of a C++ file, and of those that it includes by their paths, beside it or from `ROOT`."""
    text, found = source.read_bytes(), []
    for path in re.findall(r'^#include "(.+)"', text.decode(), re.M):
        beside = source.parent / path
        found += _texts(beside if beside.is_file() else ROOT / path)
    return [text, *found]


def about(source: Path) -> str:
    """What the library of a C++ file was compiled for, as `AVX2, OpenMP, GCC 12.2.0`; or why there is none."""
    library(source)
    return _about[source]


def _introduced(made: ctypes.CDLL, source: Path) -> ctypes.CDLL:
    """A library that was loaded, after what it says of itself was written down."""
    made.mosaics_about.restype = ctypes.c_char_p
    _about[source] = made.mosaics_about().decode()
    return made


def _short(source: Path) -> str:
    return "/".join(source.parts[-2:])


def _tell(line: str) -> None:
    """A warning the first time, as the other sources have the same to say."""
    logger.log(logging.INFO if _told else logging.WARNING, "%s", line)
    _told.append(line)


def compiler() -> list[str]:
    """The C++ compiler's command: `$CXX`, which may have options, or else `c++`.

    Raises:
        OSError: there is none.
        ValueError: there is half a quotation in it.
    """
    words = shlex.split(os.environ.get("CXX") or "c++")
    if not words or shutil.which(words[0]) is None:
        raise OSError(f"there is no C++ compiler {' '.join(words)!r}; install one, or name it in CXX")
    return words


def cache_folder() -> Path:
    """Where libraries are kept; it need not be there yet.

    Raises:
        RuntimeError: there is no home.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("MOSAICS_CACHE") or Path(cache) / "mosaics")


def _folder() -> Path:
    folder = cache_folder()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not _is_ours(folder.stat()):
        raise PermissionError(
            f"others own the folder {folder} or may write to it; chmod it to 700, or name another in MOSAICS_CACHE"
        )
    for left in folder.glob(f"{SCRATCH}*"):  # by a process that was killed
        if time.time() - left.lstat().st_mtime > ABANDONED:
            shutil.rmtree(left, ignore_errors=True)
    return folder


def _is_ours(about: os.stat_result) -> bool:
    """Whether a file or folder belongs to this user, and nobody else may write to it."""
    kind = stat.S_ISREG(about.st_mode) or stat.S_ISDIR(about.st_mode)
    return kind and about.st_uid == os.geteuid() and not about.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _made(source: Path, commands: list[list[str]], possible: list[Way], folder: Path, name: str) -> ctypes.CDLL:
    """Compile and load a library, by the first of the commands that does; it has its name only when it can be loaded
    and all of it is on the disk."""
    with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=folder) as scratch:  # another process may do the same
        first: OSError | subprocess.CalledProcessError | None = None
        for number, command in enumerate(commands):
            path = Path(scratch) / f"{name}-{number}.so"  # a file that can't be loaded may be remembered by its name
            try:
                subprocess.run([*command, "-o", str(path)], capture_output=True, check=True)
                path.chmod(0o700)
                made = ctypes.CDLL(str(path))
                break
            except (OSError, subprocess.CalledProcessError) as error:
                first = first or error
        else:
            raise first
        _sync(path)
        kept = folder / f"{name}-{_digest(path)}.so"
        os.replace(path, kept)
    _sync(folder)
    if first:
        _tell(
            f"{_short(source)} is compiled without {possible[number].without}, which is slower "
            f"(remove {kept} to try again): {_line(first)}"
        )
    return made


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _line(error: Exception) -> str:
    """An error in one line; of a compiler the first that speaks of one."""
    if not isinstance(error, subprocess.CalledProcessError):
        return str(error)
    lines = [line.strip() for line in error.stderr.decode(errors="replace").splitlines() if line.strip()]
    logger.debug("%s", "\n".join(lines))
    said = next((line for line in lines if "error" in line), lines[-1] if lines else "it said nothing")
    return f"{error.cmd[0]} ended with {error.returncode}: {said}"


def _processor() -> bytes:
    """What tells processors apart that need different code."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.system()} {platform.machine()} {platform.processor()} {features}".encode()


def straight(*given: Tensor) -> bool:
    """Whether an op calls its library without an operator between, which alone takes 18 µs: for one position, or two
    (values look one ahead), where neither gradients nor a compiler want to know. All tensors of an op are given, first
    that with the positions."""
    if given[0].shape[2] > 2 or torch.compiler.is_compiling():
        return False
    return not (torch.is_grad_enabled() and any(x.requires_grad for x in given))


def dense(x: Tensor) -> Tensor:
    """`x` with the entries of a vector, its last dimension, side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def strided(*tensors: Tensor) -> list[c_void_p | ctypes.Array]:
    """Arguments for a function of a library: the address of each tensor and the strides of its first three
    dimensions."""
    return [x for t in tensors for x in (_address(t), (c_int64 * 3)(*t.stride()[:3]))]


def plain(*tensors: Tensor | None) -> list[c_void_p]:
    """Arguments for a function of a library: the address of each tensor, which is contiguous; null for None."""
    return [c_void_p(None) if t is None else _address(t) for t in tensors]


def _address(x: Tensor) -> c_void_p:
    if type(x) is not Tensor and not has_numbers(x):
        raise ValueError(f"A compiled form reads numbers, and a {type(x).__name__} has none; use the naive form.")
    return c_void_p(x.data_ptr())

"""This machine, as far as it matters here: versions, devices, and which forms of the ops run and why."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mosaics._version import __version__

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "triton")
NEEDS_TRITON = ("triton", "flex")  # forms, on CUDA
WRITTEN_IN = {"bounded": "single"}  # a form whose C++ is in another's file


def default_device() -> str:
    """Where models go if nothing else is said: `cuda`, else `mps` (a Mac's GPU), else `cpu`."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def describe() -> dict[str, Any]:
    """All that a report of a fault should say of the machine: plain values, ready for JSON."""
    devices = {name: why() for name, why in (("cpu", _cpu), ("cuda", _cuda), ("mps", _mps))}
    return {
        "versions": _versions(),
        "machine": {
            "platform": platform.platform(),
            "processor": processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "vectors": torch.backends.cpu.get_cpu_capability(),
        },
        "compiler": _compiler(),
        "devices": {name: {"there": there, "about": about} for name, (there, about) in devices.items()},
        "default_device": default_device(),
        "forms": {name: used_forms(name) for name, (there, _) in devices.items() if there},
        "why": _reasons(devices["cuda"]),
    }


def processor() -> str:
    """The processor's name, as far as the system tells."""
    if platform.system() == "Darwin":
        try:
            asked = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, check=True)
            return asked.stdout.decode().strip()
        except (OSError, subprocess.CalledProcessError):
            return platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def used_forms(device: str, place: Callable[[Tensor], Tensor] | None = None) -> dict[str, dict[str, str]]:
    """Of each op that has forms for some machines only, the form that it takes on a device for what models ask of it.

    Args:
        device: its name.
        place: puts a tensor there.

    Returns:
        For each op what is asked and the form; or why there is none.
    """
    from mosaics.ops import kernel_regression, leaky_average, unit_values

    packages = {"kernel_regression": kernel_regression, "leaky_average": leaky_average, "unit_values": unit_values}

    place = place or (lambda x: x.to(device))

    def vectors(time: int, learned: bool = False) -> Tensor:
        return place(torch.zeros(1, 2, time, 32)).requires_grad_(learned)

    def read(asked: Tensor, stored: Tensor, reach: kernel_regression.Reach) -> Tensor:
        bandwidth = kernel_regression.Bandwidth(place(torch.ones(2)))
        return kernel_regression.kernel_regression(asked, stored, stored, bandwidth, reach)

    def average(x: Tensor) -> Any:
        gates = place(torch.zeros(x.shape[:3]))
        return leaky_average.leaky_average(x, gates, gates)

    def values(x: Tensor) -> Tensor:
        share = place(torch.full((2,), 0.5))
        return unit_values.unit_values(x, share, share)

    def training(op: Callable[..., Any], *reach: kernel_regression.Reach) -> Callable[[], Any]:
        def ask() -> Any:
            x = vectors(256, learned=True)
            return op(x, x, *reach) if reach else op(x)

        return ask

    before, window = kernel_regression.Reach(1), kernel_regression.Reach(1, window=64)
    asked: dict[str, dict[str, Callable[[], Any]]] = {
        "kernel_regression": {
            "training, window": training(read, window),
            "training, delay": training(read, kernel_regression.Reach(64)),
            "one token": lambda: read(vectors(1), vectors(256), before),
        },
        "leaky_average": {"training": training(average), "one token": lambda: average(vectors(1))},
        "unit_values": {"training": training(values), "one token": lambda: values(vectors(1))},
    }
    found: dict[str, dict[str, str]] = {}
    for op, uses in asked.items():
        for use, call in uses.items():
            try:
                with torch.set_grad_enabled(use.startswith("training")), _only_choosing(packages[op]):
                    call()
                form = "?"
            except _Chosen as chosen:
                form = str(chosen)
            except Exception as error:  # for whoever reads the report, whatever it is
                form = f"none: {next(iter(str(error).splitlines()), type(error).__name__)}"
            found.setdefault(op, {})[use] = form
    return found


class _Chosen(Exception):
    """The form that an op would have computed in."""


@contextmanager
def _only_choosing(package: ModuleType) -> Iterator[None]:
    """Let the op of a package raise `_Chosen` instead of computing: a form may take a minute to compile."""

    def choose(forms: dict[str, Callable], form: str, *rest: Any, **options: Any) -> None:
        raise _Chosen(form)

    run, package.run = package.run, choose
    try:
        yield
    finally:
        package.run = run


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"mosaics": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    found["torch"] = torch.__version__  # with what it was built for
    return found


def _compiler() -> dict[str, Any]:
    from mosaics.ops import compiling

    found: dict[str, Any] = dict.fromkeys(("command", "version", "cache"))
    found |= {name: os.environ.get(name) for name in ("CXX", "MOSAICS_CXXFLAGS", "MOSAICS_COMPILE", "MOSAICS_CACHE")}
    found["options"] = list(compiling.ways(platform.system(), platform.machine())[0].options)
    found["trouble"] = None
    try:
        found["cache"] = str(compiling.cache_folder())
        command = compiling.compiler()
        found["command"] = " ".join(command)
        said = subprocess.run([*command, "--version"], capture_output=True, check=True).stdout
        found["version"] = next(iter(said.decode(errors="replace").splitlines()), "")
    except (OSError, RuntimeError, ValueError, subprocess.CalledProcessError) as error:
        found["trouble"] = str(error)
    return found


def _cpu() -> tuple[bool, str]:
    return True, processor()


def _cuda() -> tuple[bool, str]:
    if torch.version.cuda is None and torch.version.hip is None:
        return False, "this torch was built without CUDA"
    if not torch.cuda.is_available():
        return False, "torch sees no CUDA device"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return True, f"{', '.join(names)} (CUDA {torch.version.cuda or torch.version.hip})"


def _mps() -> tuple[bool, str]:
    if torch.backends.mps.is_available():
        return True, "the GPU of this Mac; without float64"
    return False, "torch sees none" if torch.backends.mps.is_built() else "this torch was built without MPS"


def _reasons(cuda: tuple[bool, str]) -> dict[str, dict[str, str]]:
    """Of every form that not every machine has, whether it is here and why."""
    import mosaics.ops
    from mosaics.ops import compiling, kernel_regression, leaky_average, unit_values

    found: dict[str, dict[str, str]] = {}
    ops = {"kernel_regression": kernel_regression, "leaky_average": leaky_average, "unit_values": unit_values}
    for op, package in ops.items():
        for form in package.FORMS | getattr(package, "INEXACT", package.FASTER).functions():
            source = Path(mosaics.ops.__file__).parent / op / f"{WRITTEN_IN.get(form, form)}.cpp"
            if source.is_file():
                there = compiling.library(source) is not None
                about = f"{'compiled' if there else 'not compiled'}: {compiling.about(source)}"
            elif form in NEEDS_TRITON:
                about = "needs Triton, which is not installed" if find_spec("triton") is None else cuda[1]
                about = f"on CUDA: {about}" if cuda[0] else f"not here: {about}"
            else:
                continue
            found.setdefault(op, {})[form] = about
    return found

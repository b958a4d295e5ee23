"""The C++ forms as other processors run them: beside their twins, over drawn shapes (`walk.py`)."""

import ctypes
import functools
import os
import platform
import shlex
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import walk

import mosaics.ops
from mosaics.ops import compiling
from mosaics.ops.kernel_regression import Bandwidth, Narrow, Reach, bounded, compiled, naive, single, widened
from mosaics.ops.kernel_regression.sketch import Sketched, sketch_of
from mosaics.ops.leaky_average import compiled as leaky
from mosaics.ops.unit_values import compiled as unit

OPS = Path(mosaics.ops.__file__).parent
SOURCES = sorted(OPS.glob("*/*.cpp"))
COMPILER = shlex.split(os.environ.get("CXX") or "c++")
CROSS, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
LEVELS = {"x86-64": ("SSE2", "sse2"), "haswell": ("AVX2", "avx2"), "skylake-avx512": ("AVX-512", "avx512f")}


@pytest.fixture
def walked(monkeypatch):
    """Walks through draws in this process, and leaves it as it was."""
    threads = torch.get_num_threads()
    for form in (single, leaky, unit):
        monkeypatch.setattr(form, "WORTH", form.WORTH)

    def call(draws: int) -> None:
        monkeypatch.setattr(sys, "argv", ["walk", "0", str(draws)])
        walk.main()
        walk_bounded()

    yield call
    torch.set_num_threads(threads)
    compiling.library.cache_clear()


def walk_bounded() -> None:
    """Reads by a sketch are as near to the twin as they say."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.int8):
        wide = dtype if dtype.itemsize > 2 else torch.float32
        whole = [torch.nn.functional.normalize(torch.randn(2, 3, 300, 35, dtype=wide), dim=-1) for _ in range(2)]
        keys, values = whole if dtype == wide else [Narrow.of(x, dtype) for x in whole]
        parts = (*keys[:2], None) if dtype == torch.int8 else sketch_of(keys if dtype == wide else keys.data)
        given = whole[0][:, :, -1:], Bandwidth(torch.full((3,), 30.0, dtype=wide))
        found = bounded.kernel_regression(given[0], Sketched(keys, *parts, 0.01), values, given[1], Reach(1))
        exact = naive.kernel_regression(given[0], *(widened(x) for x in (keys, values)), given[1], Reach(1))
        assert (found - exact).norm(dim=-1).max() <= 0.01 * 1.01, dtype


class Emulated:
    """A library of another processor, whose functions take what `ctypes` gives to those of this one."""

    known: dict[int, torch.UntypedStorage] = {}

    def __init__(self, process: subprocess.Popen, path: Path):
        self._process, self._path = process, path

    def __getattr__(self, name: str):
        return functools.partial(self._call, name)

    def _call(self, name: str, *given) -> None:
        storages, sent, words = {}, [], []
        for x in given:
            if isinstance(x, ctypes.c_void_p) and x.value is not None:
                storage = self.known[x.value]
                if storage.data_ptr() not in storages:
                    storages[storage.data_ptr()] = len(sent)
                    sent.append((storage.data_ptr(), storage.nbytes()))
                words.append((storages[storage.data_ptr()], x.value - storage.data_ptr()))
            elif x is None or isinstance(x, ctypes.c_void_p | int):
                words.append((-1, x if isinstance(x, int) else 0))
            else:
                x = getattr(x, "_obj", x)  # of `byref`
                words.append((len(sent), 0))
                sent.append((ctypes.addressof(x), ctypes.sizeof(x)))
        write, read = self._process.stdin.write, self._process.stdout.read
        for text in (str(self._path).encode(), name.encode()):
            write(struct.pack("<q", len(text)) + text)
        write(struct.pack("<q", len(sent)))
        for address, size in sent:
            write(struct.pack("<q", size) + ctypes.string_at(address, size))
        write(struct.pack(f"<q{2 * len(words)}q", len(words), *(x for pair in words for x in pair)))
        self._process.stdin.flush()
        for address, size in sent:
            found = read(size)
            assert len(found) == size, "the emulated process ended"
            ctypes.memmove(address, found, size)
        self.known.clear()


@pytest.fixture
def emulated(tmp_path, monkeypatch):
    """Makes the ops use libraries for AArch64, compiled as the package would there."""
    if shutil.which(CROSS) is None or shutil.which(EMULATOR) is None:
        pytest.skip(f"needs {CROSS} and {EMULATOR}")
    paths = {}
    for source in SOURCES:
        path = paths[source] = tmp_path / f"{source.parent.name}-{source.stem}.so"
        for way in compiling.ways("Linux", "aarch64"):
            command = [CROSS, *way.options, str(source), str(compiling.ABOUT), *way.libraries, "-o", str(path)]
            if subprocess.run(command, capture_output=True).returncode == 0:
                break
        assert way.without == "-mcpu=native"  # a cross compiler knows no processor that is its own
    driver, root = tmp_path / "driver", Path("/usr/aarch64-linux-gnu")
    subprocess.run([CROSS, "-fopenmp", str(Path(__file__).with_name("emulator.cpp")), "-o", str(driver), "-ldl",
                    "-Wl,--no-as-needed", "-lgomp"], check=True)  # fmt: skip
    command = [EMULATOR, "-L", str(root), str(driver)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    address = compiling._address

    def remembered(x):
        Emulated.known[x.data_ptr()] = x.untyped_storage()
        return address(x)

    monkeypatch.setattr(compiling, "_address", remembered)
    for form in (compiled, single, bounded, leaky, unit):
        monkeypatch.setattr(form, "library", lambda source: Emulated(process, paths[source]))
    yield process
    process.stdin.close()
    assert process.wait() == 0


@pytest.mark.slow
def test_compiled_forms_on_aarch64_equal_their_twins(emulated, walked):
    walked(8)


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.skipif(shutil.which(COMPILER[0]) is None, reason="no C++ compiler")
def test_compiled_forms_at_every_level_of_x86_equal_their_twins(tmp_path, monkeypatch, walked, level):
    vectors, flag = LEVELS[level]
    if platform.machine() != "x86_64" or flag not in Path("/proc/cpuinfo").read_text():
        pytest.skip(f"this processor has no {vectors}")
    monkeypatch.delenv("MOSAICS_COMPILE", raising=False)
    compiling.library.cache_clear()
    if not compiling.about(SOURCES[0]).startswith(f"{vectors}, OpenMP"):  # else it is that of this processor
        monkeypatch.setenv("MOSAICS_CXXFLAGS", f"-march={level}")
        monkeypatch.setenv("MOSAICS_CACHE", str(tmp_path / "cache"))
        compiling.library.cache_clear()
    assert all(compiling.about(source).startswith(f"{vectors}, OpenMP") for source in SOURCES)
    walked(10)

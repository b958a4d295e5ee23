"""The C++ forms under AddressSanitizer and UndefinedBehaviorSanitizer, compiled as for use but for some options: no
access beyond a tensor, whatever its shape, strides and numbers."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mosaics

COMPILER = shlex.split(os.environ.get("CXX") or "c++")
# The third keeps exceptions working when the first comes before it.
RUNTIMES = ("libasan.so", "libubsan.so", "libstdc++.so.6")
OPTIONS = "-O1 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined"
HERE = Path(__file__).parent

PLANTED = {
    "a read beyond the end": ("double", "x[n]", "heap-buffer-overflow"),
    "a shift of what is negative": ("int64_t", "-n << 3", "left shift of negative value"),
}


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Of a process in which sanitized libraries are compiled and can be loaded."""
    if shutil.which(COMPILER[0]) is None:
        pytest.skip("no C++ compiler")
    ask = [[*COMPILER, f"-print-file-name={name}"] for name in RUNTIMES]
    found = [subprocess.run(command, capture_output=True, text=True).stdout.strip() for command in ask]
    if not all(os.path.isabs(path) and os.path.exists(path) for path in found):
        pytest.skip(f"the compiler has not all of {', '.join(RUNTIMES)}")
    places = [str(Path(mosaics.__file__).parents[1]), str(HERE.parent)]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([*places, os.environ.get("PYTHONPATH", "")]),
        "MOSAICS_CACHE": str(tmp_path_factory.mktemp("sanitized") / "cache"),
        "MOSAICS_CXXFLAGS": OPTIONS,
        "MOSAICS_COMPILE": "1",
        "LD_PRELOAD": " ".join(found),
        "ASAN_OPTIONS": "detect_leaks=0",  # the interpreter's own
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "2",
        "OMP_WAIT_POLICY": "PASSIVE",
    }


@pytest.fixture(scope="module")
def walked(environment, tmp_path_factory) -> tuple[subprocess.CompletedProcess, dict[str, tuple[int, str]]]:
    """A process that walks, after others forked from it that do what is planted: how each of those ended, and what was
    said."""
    folder, sources = tmp_path_factory.mktemp("planted"), {}
    for number, (fault, (kind, value, _)) in enumerate(PLANTED.items()):
        sources[fault] = folder / f"planted{number}.cpp"
        body = f'const {kind} y = {value}; std::printf("%f", double(y));'
        head = '#include <cstdint>\n#include <cstdio>\nextern "C" void planted(double* x, int64_t n)'
        sources[fault].write_text(f"{head} {{ {body} }}\n")
    command = [sys.executable, str(HERE / "walk.py"), "0", "40", *map(str, sources.values())]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=580)
    ended = {}
    for fault, source in sources.items():
        said, _, rest = done.stderr.partition(f"\n{source} ended with ")
        code, _, done.stderr = rest.partition("\n")
        ended[fault] = int(code or 0), said
    return done, ended


@pytest.mark.sanitized
@pytest.mark.timeout(600)
@pytest.mark.slow
def test_compiled_forms_stay_within_their_tensors(walked):
    done, _ = walked
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "walked 40", done.stderr[:6000]
    assert "Sanitizer" not in done.stderr and "runtime error" not in done.stderr, done.stderr[:6000]


@pytest.mark.sanitized
@pytest.mark.timeout(600)
@pytest.mark.parametrize("fault", PLANTED)
@pytest.mark.slow
def test_sanitizers_find_what_is_planted(walked, fault):
    code, said = walked[1][fault]
    assert code != 0 and PLANTED[fault][2] in said, said[:6000]

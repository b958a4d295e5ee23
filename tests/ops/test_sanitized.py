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
    }


def walk(environment, *words) -> subprocess.CompletedProcess:
    command = [sys.executable, str(HERE / "walk.py"), *map(str, words)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=580)


@pytest.mark.sanitized
@pytest.mark.timeout(600)
@pytest.mark.slow
def test_compiled_forms_stay_within_their_tensors(environment):
    done = walk(environment, 0, 40)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "walked 40", done.stderr[:6000]
    assert "Sanitizer" not in done.stderr and "runtime error" not in done.stderr, done.stderr[:6000]


@pytest.mark.sanitized
@pytest.mark.timeout(600)
@pytest.mark.parametrize("fault", PLANTED)
@pytest.mark.slow
def test_sanitizers_find_what_is_planted(environment, tmp_path, fault):
    kind, value, said = PLANTED[fault]
    source = tmp_path / "planted.cpp"
    source.write_text(
        "#include <cstdint>\n#include <cstdio>\n"
        f'extern "C" void planted(double* x, int64_t n) {{ const {kind} y = {value}; std::printf("%f", double(y)); }}\n'
    )
    done = walk(environment, source)
    assert done.returncode != 0 and said in done.stderr, done.stderr[:6000]

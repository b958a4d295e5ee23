import ctypes
import hashlib
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from helpers import VOCABULARY, tiny_model
from mosaics.ops import compiling
from mosaics.ops.kernel_regression import compiled

SOURCE = 'extern "C" int {name}() {{ return {value}; }}'

COMPILER = shlex.split(os.environ.get("CXX") or "c++")
needs_compiler = pytest.mark.skipif(shutil.which(COMPILER[0]) is None, reason="no C++ compiler")
# A process of its own, whose exit code is the answer, or 99 without a library. So named it imports no models.
ASK = "import pathlib, sys; path = pathlib.Path(sys.argv[1]); sys.argv[0] = 'mosaics'; "
ASK += "from mosaics.ops.compiling import library; made = library(path); "
ASK += "sys.exit(99 if made is None else made.answer())"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    compiling.library.cache_clear()
    monkeypatch.setattr(compiling, "_told", [])
    folder = tmp_path / "cache"
    monkeypatch.setenv("MOSAICS_CACHE", str(folder))
    monkeypatch.delenv("MOSAICS_COMPILE", raising=False)
    yield folder
    compiling.library.cache_clear()


def write(folder: Path, value: int) -> Path:
    path = folder / "answer.cpp"
    path.write_text(SOURCE.format(name="answer", value=value))
    return path


def again(path: Path):
    """What a later process would get."""
    compiling.library.cache_clear()
    return compiling.library(path)


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@needs_compiler
def test_library_compiles_once_and_again_after_a_change(tmp_path, cache, monkeypatch):
    assert compiling.library(write(tmp_path, 42)).answer() == 42
    (made,) = cache.iterdir()
    before = made.stat().st_mtime_ns
    compiling.library.cache_clear()
    assert compiling.library(tmp_path / "answer.cpp").answer() == 42
    assert made.stat().st_mtime_ns == before and len(list(cache.iterdir())) == 1
    compiling.library.cache_clear()
    assert compiling.library(write(tmp_path, 43)).answer() == 43
    assert len(list(cache.iterdir())) == 2
    compiling.library.cache_clear()
    monkeypatch.setattr(compiling, "_processor", lambda: b"another one, with the same home")
    assert compiling.library(tmp_path / "answer.cpp").answer() == 43
    assert len(list(cache.iterdir())) == 3
    monkeypatch.setenv("MOSAICS_CXXFLAGS", "-O1 -DNAME='a b'")
    assert again(tmp_path / "answer.cpp").answer() == 43
    assert len(list(cache.iterdir())) == 4


@needs_compiler
def test_library_compiles_again_after_a_change_of_what_is_included(tmp_path, cache):
    path = write(tmp_path, 42)
    path.write_text('#include "inner/value.h"\n' + SOURCE.format(name="answer", value="VALUE"))
    (tmp_path / "inner").mkdir()
    for value in (42, 43):
        (tmp_path / "inner" / "value.h").write_text('#include "other.h"\n')
        (tmp_path / "inner" / "other.h").write_text(f"#define VALUE {value}\n")
        assert again(path).answer() == value


REFUSED = {  # words that a compiler does not take, and what is then left out
    ("-fopenmp",): "OpenMP",
    ("-march=native", "-mcpu=native"): "-m[a-z]*=native",
    ("-fopenmp", "-march=native", "-mcpu=native"): "OpenMP and -m[a-z]*=native",
    ("-fopenmp", "-fopenmp-simd", "-nodefaultlibs"): "OpenMP and -m[a-z]*=native",
}


def picky(path: Path, words: tuple[str, ...], system: str = "") -> str:
    """A compiler that refuses some words, and takes those of Apple's linker if it is one of a Mac."""
    text = 'keep=; for word; do shift; case "$word" in '
    text += f'{"|".join(words)}) echo "error: what is $word?" >&2; exit 1;; ' if words else ""
    text += '-Xpreprocessor|-undefined|dynamic_lookup) ;; -dynamiclib) set -- "$@" -shared;; ' if system else ""
    return script(path, f'{text}*) set -- "$@" "$word";; esac; done\nexec {shlex.join(COMPILER)} "$@"')


@needs_compiler
def test_library_of_another_package_includes_our_headers(tmp_path, cache):
    name = "mosaics/memories/contract/one_token.h"
    source = tmp_path / "theirs.cpp"
    source.write_text(f'#include "{name}"\n' + SOURCE.format(name="answer", value=7))
    assert compiling.library(source).answer() == 7
    assert (compiling.ROOT / name).read_bytes() in compiling._texts(source)  # with which it is compiled again


@needs_compiler
@pytest.mark.parametrize("words", REFUSED)
def test_library_goes_without_what_the_compiler_refuses_and_says_so_once(tmp_path, cache, words, monkeypatch, caplog):
    path = write(tmp_path, 42)
    monkeypatch.setenv("CXX", picky(tmp_path / "cc", words))
    assert compiling.library(path).answer() == 42 and again(path).answer() == 42
    (line,) = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    (made,) = cache.iterdir()
    assert re.fullmatch(
        rf"\S*answer.cpp is compiled without {REFUSED[words]}, which is slower \(remove {made} to try again\): .*"
        r"what is -\S*native\?"
        if "-fopenmp" not in words
        else rf"\S*answer.cpp is compiled without {REFUSED[words]}.*",
        line,
    )
    assert ("no OpenMP" in compiling.about(path)) == ("-fopenmp" in words)


@needs_compiler
def test_library_is_made_with_the_words_of_a_mac(tmp_path, cache, monkeypatch, caplog):
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    monkeypatch.setenv("CXX", picky(tmp_path / "cc", ("-nodefaultlibs", "-shared"), "Darwin"))
    path = write(tmp_path, 42)
    assert compiling.library(path).answer() == 42 and ", OpenMP, " in compiling.about(path) and not caplog.messages


def test_ways_name_the_options_of_each_machine():
    mac, arm, intel, other = (
        compiling.ways(*x)
        for x in (("Darwin", "arm64"), ("Linux", "aarch64"), ("Linux", "x86_64"), ("Linux", "riscv64"))
    )
    assert "-mcpu=native -Xpreprocessor -fopenmp -dynamiclib -undefined dynamic_lookup" in " ".join(mac[0].options)
    assert mac[0].libraries == () and "-fopenmp" not in mac[1].options and "-mcpu=native" not in mac[2].options
    assert [("-march=native" in x[0].options, "-mcpu=native" in x[0].options) for x in (intel, arm, other)] == [
        (True, False),
        (False, True),
        (False, True),
    ]
    for found in (mac, arm, intel, other):
        assert found[0].without == "" and len({way.options for way in found}) == len(found) == 5


@needs_compiler
@pytest.mark.slow
def test_library_that_is_damaged_is_made_again_by_a_new_process(tmp_path, cache):
    path = write(tmp_path, 42)
    assert compiling.library(path).answer() == 42
    (made,) = cache.iterdir()
    whole = made.read_bytes()
    middle = len(whole) // 2
    for damaged in (whole[:middle], whole[:middle] + bytes([whole[middle] ^ 64]) + whole[middle + 1 :]):
        made.unlink()  # this process still has it
        made.write_bytes(damaged)
        made.chmod(0o700)
        assert subprocess.run([sys.executable, "-c", ASK, str(path)]).returncode == 42
        assert [x.read_bytes() for x in cache.iterdir()] == [whole]


@needs_compiler
@pytest.mark.slow
def test_library_is_compiled_by_several_processes_at_once(tmp_path, cache):
    path = write(tmp_path, 42)
    # Leaves half a library in its place for a while.
    text = 'for word; do [ "$last" = -o ] && { echo half > "$word"; sleep 1; }; last=$word; done\n'
    slow = script(tmp_path / "slow", f'{text}exec {shlex.join(COMPILER)} "$@"')
    command, running = [sys.executable, "-c", ASK, str(path)], []
    for _ in range(3):
        running.append(subprocess.Popen(command, env=os.environ | {"CXX": slow}))
        time.sleep(0.3)
    assert [process.wait() for process in running] == [42] * 3
    assert len(list(cache.iterdir())) == 1


@needs_compiler
@pytest.mark.slow
def test_library_is_made_again_after_a_kill_while_it_was_compiled(tmp_path, cache):
    path, begun = write(tmp_path, 42), tmp_path / "begun"
    text = f'for word; do [ "$last" = -o ] && {{ echo half > "$word"; echo $$ > {begun}; sleep 60; }}; last=$word; done'
    slow = script(tmp_path / "slow", f'{text}\nexec {shlex.join(COMPILER)} "$@"')
    process = subprocess.Popen([sys.executable, "-c", ASK, str(path)], env=os.environ | {"CXX": slow})
    while not begun.exists() or not begun.read_text().strip():
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    os.kill(int(begun.read_text()), signal.SIGKILL)  # the compiler outlives it
    (left,) = cache.iterdir()
    assert left.is_dir() and [x.read_text() for x in left.iterdir()] == ["half\n"]
    assert again(path).answer() == 42
    assert left.exists()  # it might be that of another process
    os.utime(left, times=(0, time.time() - 2 * compiling.ABANDONED))
    assert again(path).answer() == 42
    assert not left.exists() and len(list(cache.iterdir())) == 1


@needs_compiler
@pytest.mark.parametrize("damage", ["cut", "empty", "bit", "another", "link", "folder", "writable", "gone"])
def test_library_that_is_damaged_or_that_others_could_change_is_made_again(tmp_path, cache, damage, caplog):
    path = write(tmp_path, 42)
    assert compiling.library(path).answer() == 42
    (made,) = cache.iterdir()
    whole = made.read_bytes()
    assert made.stem.endswith(hashlib.sha256(whole).hexdigest()) and not made.stat().st_mode & 0o077
    made.unlink()
    if damage == "cut":
        made.write_bytes(whole[: len(whole) // 2])
    elif damage == "empty":
        made.write_bytes(b"")
    elif damage == "bit":
        made.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    elif damage == "another":  # whole, and without what is looked for
        other = tmp_path / "other.cpp"
        other.write_text(SOURCE.format(name="other", value=7))
        subprocess.run([*COMPILER, "-shared", "-fPIC", str(other), "-o", str(made)], check=True)
    elif damage == "link":
        (tmp_path / "elsewhere").write_bytes(whole)
        made.symlink_to(tmp_path / "elsewhere")
    elif damage == "writable":
        made.write_bytes(whole)
        made.chmod(0o666)
    elif damage == "folder":
        made.mkdir()
    if damage == "folder":  # which is no library of ours, and not to be removed
        assert again(path) is None and "is not compiled" in caplog.text
        return
    assert again(path).answer() == 42
    (other,) = cache.iterdir()
    assert other.read_bytes() == whole and other.is_file() and not other.is_symlink()
    assert not other.stat().st_mode & 0o077


@needs_compiler
def test_library_that_another_user_planted_is_not_loaded(tmp_path, cache, monkeypatch, caplog):
    path = write(tmp_path, 42)
    assert compiling.library(path).answer() == 42
    me = os.geteuid()
    for mode, user in ((0o777, me), (0o770, me), (0o1777, me), (0o755, me + 1)):
        cache.chmod(mode)
        monkeypatch.setattr(os, "geteuid", lambda user=user: user)
        caplog.clear()
        compiling._told.clear()
        assert again(path) is None
        assert f"others own the folder {cache} or may write to it" in caplog.messages[0]


@needs_compiler
def test_library_makes_a_folder_that_is_ours_alone(tmp_path, cache):
    before = os.umask(0)
    try:
        assert compiling.library(write(tmp_path, 42)).answer() == 42
    finally:
        os.umask(before)
    assert cache.stat().st_mode & 0o777 == 0o700 and [x.stat().st_mode & 0o777 for x in cache.iterdir()] == [0o700]


@needs_compiler
def test_library_is_on_the_disk_before_it_has_its_name(tmp_path, cache, monkeypatch):
    done = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: done.append(os.readlink(f"/proc/self/fd/{file}")) or sync(file))
    monkeypatch.setattr(os, "replace", lambda a, b: done.append("replace") or replace(a, b))
    assert compiling.library(write(tmp_path, 42)).answer() == 42
    assert done[0].endswith(".so") and done[1:] == ["replace", str(cache)]


@needs_compiler
@pytest.mark.parametrize("words", ["{compiler} -O1", "{launcher} {compiler}", "'{spaced}' -O1"])
def test_library_takes_a_compiler_with_words_after_it(tmp_path, cache, words, monkeypatch):
    real = shlex.join([shutil.which(COMPILER[0]), *COMPILER[1:]])
    launcher = script(tmp_path / "launcher", 'exec "$@"')
    spaced = script(tmp_path / "a compiler", f'exec {real} "$@"')
    monkeypatch.setenv("CXX", words.format(compiler=real, launcher=launcher, spaced=spaced))
    assert compiling.library(write(tmp_path, 42)).answer() == 42


FAULTS = {
    "source": "slow.*error",
    "compiler": "ended with 3: it said nothing",
    "compiler gone": "there is no C\\+\\+ compiler 'no-such-compiler'; install one, or name it in CXX",
    "compiler killed": "ended with -9",
    "quotation": "No closing quotation",
    "nothing made": "cannot open|No such file",
    "half made": "file too short",
    "folder": "in the way|exists",
    "forbidden": "",
    "library": "undefined symbol",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_library_that_cannot_be_made_is_none_with_one_line_that_says_why(tmp_path, cache, fault, monkeypatch, caplog):
    path = write(tmp_path, 42)
    if fault == "source":
        path.write_text("this is no C++\nnor is this")
    elif fault.startswith("compiler "):
        monkeypatch.setenv("CXX", "no-such-compiler")
    elif fault == "forbidden":
        monkeypatch.setenv("MOSAICS_COMPILE", "0")
    elif fault == "library":
        monkeypatch.setattr(ctypes, "CDLL", lambda name: (_ for _ in ()).throw(OSError("undefined symbol")))
    elif fault == "quotation":
        monkeypatch.setenv("CXX", "'c++")
    elif fault == "folder":
        cache.write_text("in the way")
    codes = {"compiler": "exit 3", "compiler killed": '[ "$1" = --version ] || kill -9 $$', "nothing made": "exit 0"}
    codes["half made"] = 'for word; do [ "$last" = -o ] && echo half > "$word"; last=$word; done'
    if fault in codes:
        monkeypatch.setenv("CXX", script(tmp_path / "cc", codes[fault]))
    with caplog.at_level(logging.INFO):
        assert compiling.library(path) is None
        assert again(path) is None
    warned = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert not cache.is_dir() or not list(cache.iterdir())  # nothing half made, or that can't be loaded
    if fault == "forbidden":
        assert not caplog.messages
        return
    assert len(warned) == 1 and "\n" not in warned[0]  # once, however many libraries
    assert re.search(f"answer.cpp is not compiled.*({FAULTS[fault]})", warned[0]), warned[0]


@pytest.mark.slow
def test_library_without_a_compiler_says_one_line_where_logging_is_not_set_up(tmp_path):
    code = """
import os, sys
sys.argv[0] = "mosaics"  # imports no models
import torch
from mosaics.ops import compiling
from mosaics.ops.kernel_regression import *
from mosaics.ops.unit_values import *
x, one = torch.randn(1, 1, 9, 4), torch.ones(1)
for allowed in "01":
    os.environ["MOSAICS_COMPILE"] = allowed
    compiling.library.cache_clear()
    print("allowed:", allowed, file=sys.stderr)
    kernel_regression(x, x, x, Bandwidth(one), Reach(1))
    unit_values(x, one, one)
"""
    environment = os.environ | {"CXX": "no-such-compiler", "MOSAICS_CACHE": str(tmp_path / "new")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    forbidden, allowed = (
        [line for line in part.splitlines() if "slower" in line] for part in done.stderr.split("allowed: 1")
    )
    assert forbidden == [] and len(allowed) == 1 and "no C++ compiler 'no-such-compiler'" in allowed[0]


def test_model_runs_without_a_compiler(cache, monkeypatch):
    monkeypatch.setenv("MOSAICS_COMPILE", "0")
    model = tiny_model().train()
    ids = torch.randint(VOCABULARY, (1, 300))
    model(ids, labels=ids).loss.backward()
    assert not compiled.available()

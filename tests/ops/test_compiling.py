import ctypes
import logging
import os
import shutil
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

needs_compiler = pytest.mark.skipif(shutil.which(os.environ.get("CXX") or "c++") is None, reason="no C++ compiler")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    compiling.library.cache_clear()
    folder = tmp_path / "cache"
    monkeypatch.setenv("MOSAICS_CACHE", str(folder))
    monkeypatch.delenv("MOSAICS_COMPILE", raising=False)
    yield folder
    compiling.library.cache_clear()


def write(folder: Path, value: int) -> Path:
    path = folder / "answer.cpp"
    path.write_text(SOURCE.format(name="answer", value=value))
    return path


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


@needs_compiler
def test_library_is_compiled_by_several_processes_at_once(tmp_path, cache, monkeypatch):
    path, real = write(tmp_path, 42), shutil.which(os.environ.get("CXX") or "c++")
    slow = tmp_path / "slow"  # leaves half a library in its place for a while
    slow.write_text(
        f'#!/bin/sh\nfor word; do [ "$last" = -o ] && {{ echo half > "$word"; sleep 1; }}; last=$word; done\n'
        f'exec {real} "$@"\n'
    )
    slow.chmod(0o755)
    code = "import pathlib, runpy, sys; library = runpy.run_path(sys.argv[1])['library']; "
    code += "sys.exit(library(pathlib.Path(sys.argv[2])).answer())"
    command, running = [sys.executable, "-c", code, compiling.__file__, str(path)], []
    for _ in range(3):
        running.append(subprocess.Popen(command, env=os.environ | {"CXX": str(slow)}))
        time.sleep(0.3)
    assert [process.wait() for process in running] == [42] * 3
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("fault", ["source", "compiler", "compiler gone", "folder", "forbidden", "library"])
def test_library_that_cannot_be_made_is_none_with_the_reason(tmp_path, cache, fault, monkeypatch, caplog):
    path = write(tmp_path, 42)
    if fault == "source":
        path.write_text("this is no C++")
    elif fault == "compiler":
        script = tmp_path / "cc"
        script.write_text("#!/bin/sh\nexit 3\n")
        script.chmod(0o755)
        monkeypatch.setenv("CXX", str(script))
    elif fault == "compiler gone":
        monkeypatch.setenv("CXX", "no-such-compiler")
    elif fault == "folder":
        cache.write_text("in the way")
    elif fault == "forbidden":
        monkeypatch.setenv("MOSAICS_COMPILE", "0")
    else:
        monkeypatch.setattr(ctypes, "CDLL", lambda name: (_ for _ in ()).throw(OSError("undefined symbol")))
    with caplog.at_level(logging.INFO):
        assert compiling.library(path) is None
    assert fault == "forbidden" or "answer.cpp is not compiled" in caplog.text
    assert not cache.is_dir() or not [x for x in cache.iterdir() if x.is_dir()]  # nothing half made


def test_model_runs_without_a_compiler(cache, monkeypatch):
    monkeypatch.setenv("MOSAICS_COMPILE", "0")
    model = tiny_model().train()
    ids = torch.randint(VOCABULARY, (1, 300))
    model(ids, labels=ids).loss.backward()
    assert not compiled.available()

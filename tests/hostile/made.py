"""What gets broken: a small corpus, prepared, and a finished run. Made once in a process; copy before changing."""

import atexit
import contextlib
import copy
import functools
import io
import shutil
import sysconfig
import tempfile
from pathlib import Path

from training.conftest import MODULES, TINY


@functools.cache
def folder() -> Path:
    """Where all of it lies; removed at the end."""
    path = Path(tempfile.mkdtemp(prefix="mosaics-hostile-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


@functools.cache
def corpus() -> Path:
    path = folder() / "corpus"
    path.mkdir()
    for name in MODULES:
        shutil.copy(Path(sysconfig.get_path("stdlib")) / f"{name}.py", path / f"{name}.txt")
    return path


@functools.cache
def prepared() -> Path:
    from mosaics.data import prepare

    prepare(str(corpus()), folder() / "prepared", vocab_size=300, validation=0.2)
    return folder() / "prepared"


def values(**training) -> dict:
    """The tiny recipe as plain data."""
    values = copy.deepcopy(TINY)
    values["data"]["prepared"] = str(prepared())
    values["training"] |= training
    return values


def recipe(**training):
    from mosaics.training.recipe import make_recipe

    return make_recipe(values(**training))


@functools.cache
def run() -> Path:
    """A finished run that was never stopped."""
    from mosaics.training import train

    with contextlib.redirect_stdout(io.StringIO()):
        assert train(recipe(), folder() / "run").finished
    return folder() / "run"


def exported() -> Path:
    return run() / "export"


@functools.cache
def memory() -> Path:
    """What the exported model remembers of a text, in a folder of its own."""
    from mosaics.models.loading import load_exported
    from mosaics.models.memory_file import read_context, save_memory

    model, tokenizer = load_exported(exported())
    ids = tokenizer("import os and some more text to read", return_tensors="pt").input_ids
    (folder() / "memory").mkdir()
    save_memory(folder() / "memory" / "text.safetensors", model, read_context(model, ids), ids)
    return folder() / "memory"

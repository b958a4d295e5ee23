"""A tiny run on real text: sources of a few modules of the standard library, in seconds on one core."""

import copy
import shutil
import sysconfig
from pathlib import Path

import pytest

from mosaics.training.recipe import Recipe, make_recipe

MODULES = (
    "bisect",
    "colorsys",
    "contextlib",
    "fnmatch",
    "heapq",
    "keyword",
    "linecache",
    "string",
    "textwrap",
    "types",
)
TINY = {
    "model": {
        "preset": "memory-mosaics-v2-tiny",
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "window": 8,
        "delay": 4,
        "train_delay": [4, 8],
        "dropout": 0.1,
    },
    "data": {"vocabulary_size": 300, "validation": 0.2},
    "training": {
        "steps": 6,
        "context_length": 48,
        "batch_size": 4,
        "micro_batch_size": 2,
        "learning_rate": 0.01,
        "warmup_steps": 2,
        "precision": "float32",
        "device": "cpu",
    },
    "validation": {"every": 3, "sequences": 4},
    "checkpoint": {"every": 2, "keep": 3},
    "logging": {"every": 1},
}


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A folder of text files."""
    folder = tmp_path_factory.mktemp("corpus")
    for name in MODULES:
        shutil.copy(Path(sysconfig.get_path("stdlib")) / f"{name}.py", folder / f"{name}.txt")
    return folder


@pytest.fixture(scope="session")
def prepared(corpus, tmp_path_factory) -> Path:
    """The corpus, prepared."""
    from mosaics.data import prepare

    folder = tmp_path_factory.mktemp("prepared") / "data"
    prepare(str(corpus), folder, vocab_size=300, validation=0.2)
    return folder


@pytest.fixture(scope="session")
def tiny(prepared):
    """Makes the tiny recipe, with dotted changes."""

    def make(changes: dict | None = None) -> Recipe:
        values = copy.deepcopy(TINY)
        values["data"]["prepared"] = str(prepared)
        for dotted, value in (changes or {}).items():
            section, _, key = dotted.partition(".")
            if key:
                values.setdefault(section, {})[key] = value
            else:
                values[section] = value
        return make_recipe(values)

    return make


@pytest.fixture(scope="session")
def finished(tiny, tmp_path_factory) -> Path:
    """A finished tiny run, never stopped. Copy it before changing it."""
    from mosaics.training import train

    folder = tmp_path_factory.mktemp("runs") / "finished"
    assert train(tiny(), folder).finished
    return folder


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy of the finished run."""
    return shutil.copytree(finished, tmp_path / "run")

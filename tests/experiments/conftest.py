"""Studies of two arrangements with one block of width 32, trained for a few steps."""

import shutil
import sysconfig
from pathlib import Path

import pytest

from mosaics.experiments.compare import study
from mosaics.experiments.studies import run_study

MICRO = {
    "model.hidden_size": 32,
    "model.num_hidden_layers": 1,
    "model.num_attention_heads": 2,
    "model.intermediate_size": 32,
    "model.short_term.window": 8,
    "model.long_term.delay": 4,
    "model.long_term.train_delay": [4, 8],
    "training.steps": 3,
    "training.context_length": 64,
    "training.batch_size": 4,
    "training.warmup_steps": 1,
    "data.vocabulary_size": 300,
    "data.validation": 0.3,
}
OPTIONS = [word for key, value in MICRO.items() for word in (f"--{key}", str(value).replace(" ", ""))]


@pytest.fixture(scope="session")
def texts(tmp_path_factory) -> Path:
    """A few text files."""
    folder = tmp_path_factory.mktemp("texts")
    for name in ("bisect", "colorsys", "fnmatch", "heapq", "string", "textwrap"):
        shutil.copy(Path(sysconfig.get_path("stdlib")) / f"{name}.py", folder / f"{name}.txt")
    return folder


@pytest.fixture(scope="session")
def small_study(texts):
    """Recall and text, two seeds, two learning rates tried."""
    return study(
        worlds=["recall"], corpus=str(texts), seeds=(0, 1), learning_rates=(1e-3, 2e-3), samples=4, changes=MICRO
    )


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def results(small_study, cache):
    """What running the study gave."""
    return run_study(small_study, cache)

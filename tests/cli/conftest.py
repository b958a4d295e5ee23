"""A small corpus, and a run made by the command line."""

import shutil
import sysconfig
from pathlib import Path

import pytest

from mosaics.cli import main

OPTIONS = (
    "--model.hidden_size 16 --model.num_hidden_layers 2 --model.num_attention_heads 2 --model.intermediate_size 24 "
    "--model.window 8 --model.delay 4 --model.train_delay [4,8] --data.vocabulary_size 300 --data.validation 0.2 "
    "--training.steps 4 --training.context_length 48 --training.batch_size 4 --training.micro_batch_size null "
    "--validation.every 2 --validation.sequences 4 --checkpoint.every 2 --logging.every 1"
).split()


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory) -> Path:
    """A folder of text files: sources of a few modules of the standard library."""
    folder = tmp_path_factory.mktemp("texts")
    for name in ("bisect", "colorsys", "contextlib", "fnmatch", "heapq", "keyword", "string", "textwrap"):
        shutil.copy(Path(sysconfig.get_path("stdlib")) / f"{name}.py", folder / f"{name}.txt")
    return folder


@pytest.fixture(scope="session")
def small_run(text_folder, tmp_path_factory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    assert main(["train", "quickstart", "--run", str(folder), "--data.corpus", str(text_folder), *OPTIONS]) == 0
    return folder


@pytest.fixture
def mosaics(capfd, monkeypatch):
    """Runs the command line; gives the exit code and what was printed on stdout and stderr."""
    monkeypatch.delenv("MOSAICS_TRACEBACK", raising=False)

    def call(*words: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main([str(word) for word in words])
        return code, *capfd.readouterr()

    return call


@pytest.fixture
def refused(mosaics):
    """Runs a command line that must be refused in one sentence; gives the sentence."""

    def call(*words: object) -> str:
        code, _, error = mosaics(*words)
        assert code == 2, error
        assert error.startswith("error: ") and error.count("\n") == 1 and "Traceback" not in error, error
        return error

    return call

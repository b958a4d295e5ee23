"""Whatever comes from outside is taken rightly or refused in one sentence."""

import errno
import os

import pytest

from . import inputs, targets
from .inputs import NotRefusedInOneSentence, attempts, result_or_sentence
from .large import empty_documents, endless_line

EXAMPLES = {
    "corpus_texts": 5,
    "corpus_files": 6,
    "corpus_that_changes": 5,
    "exported_by_stranger": 8,
    "exported_folder": 8,
    "checkpoint_folder": 8,
    "checkpoint_by_stranger": 8,
    "run_folder": 5,
    "memory_by_stranger": 8,
}


@pytest.mark.parametrize("name", inputs.TARGETS)
def test_every_target_is_right_or_refused_in_one_sentence(name):
    assert attempts(name, EXAMPLES.get(name, 10)) >= 5


def test_prepare_takes_a_line_without_end_whole(tmp_path):
    assert endless_line(tmp_path, 1) is None


def test_prepare_counts_empty_documents_and_leaves_them_out(tmp_path):
    assert empty_documents(tmp_path, 5000) is None


def _raise(error):
    raise error


@pytest.mark.parametrize(
    "error",
    [
        KeyError("x"),
        TypeError("x"),
        ValueError("invalid literal for x"),
        ValueError("it does not name what is wrong"),
        UnicodeDecodeError("utf-8", b"x", 0, 1, "invalid start byte"),
    ],
)
def test_result_or_sentence_lets_nothing_through_but_sentences(error):
    with pytest.raises(NotRefusedInOneSentence):
        result_or_sentence(lambda: _raise(error), "x")
    assert result_or_sentence(lambda: _raise(OSError(errno.ENOENT, os.strerror(errno.ENOENT), "x")), "x") is None
    assert result_or_sentence(lambda: 3) == 3


def test_attempts_shows_an_input_that_fails(monkeypatch):
    monkeypatch.setitem(inputs.TARGETS, "broken", lambda folder, draw: 1 // draw(targets.st.integers(0, 3)))
    with pytest.raises(ZeroDivisionError):
        attempts("broken", 50)
